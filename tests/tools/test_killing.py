"""The look at folders that killed runs leave: what differs, and what is torn."""

import math
import pathlib
import tempfile
import zipfile

import numpy as np
from absl.testing import absltest, parameterized

from tools.killing.folders import difference, examine

NAN, INF = math.nan, math.inf


def outcome(values=(1.0, 2.0), dtype="float32", **event):
    """Return an outcome of one variable and one event."""
    arrays = {"first": np.ones(3, "float32"), "kernel": np.array(values, dtype), "last": np.arange(2)}
    return arrays, [{"event": "update", "update": 1, "step_loss": 0.5, "loss": 2.0, **event}]


class DifferenceTest(parameterized.TestCase):
    def test_the_same(self):
        self.assertEqual(difference(outcome(), outcome()), 0.0)
        for same in ({"values": (1.0, NAN)}, {"step_loss": NAN}, {"step_loss": None}, {"text": "a"}, {"values": ()}):
            self.assertEqual(difference(outcome(**same), outcome(**same)), 0.0)

    def test_finite(self):
        self.assertAlmostEqual(difference(outcome((3.0, 4.5)), outcome((3.0, 4.0))), 0.1)
        self.assertAlmostEqual(difference(outcome(step_loss=0.75), outcome()), 0.5)

    @parameterized.parameters(
        {"values": (1.0, NAN)},
        {"values": (1.0, INF)},
        {"values": (1.0, 2.0, 3.0)},
        {"values": (1.0,)},
        {"step_loss": NAN},
        {"step_loss": -INF},
        {"step_loss": None},
        {"step_loss": "0.5"},
        {"event": "eval"},
        {"more": 1.0},
    )
    def test_infinite(self, **other):
        """Also where a finite difference comes before or after it."""
        for finite in ({}, {"loss": 2.5}):
            for pair in ((outcome(**other), outcome(**finite)), (outcome(**finite), outcome(**other))):
                self.assertEqual(difference(*pair), INF)

    def test_a_nan_in_another_place(self):
        self.assertEqual(difference(outcome((NAN, 1.0)), outcome((1.0, NAN))), INF)


class ExamineTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self):
        with zipfile.ZipFile(self.dir / "model.keras", "w") as archive:
            archive.writestr("model.weights.h5", b"weights of a model")

    def test_a_whole_model(self):
        self.write()
        self.assertEqual(examine(self.dir, {}), {"checkpoints": [], "logged": 0})

    def test_a_torn_member_of_the_model(self):
        """The list of the members is at the end of the file, and whole."""
        self.write()
        path = self.dir / "model.keras"
        path.write_bytes(path.read_bytes().replace(b"weights of", b"weights 0f"))
        with self.assertRaisesRegex(RuntimeError, "model.keras is torn: model.weights.h5"):
            examine(self.dir, {})


if __name__ == "__main__":
    absltest.main()
