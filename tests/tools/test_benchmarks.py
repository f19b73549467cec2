"""The benchmarks measure what they say; their speed is not tested."""

import math
from unittest import mock

import keras
import numpy as np
import pytest
from absl.testing import absltest

from tools.benchmarks import host_time, optimizer_step


class OptimizerStepTest(absltest.TestCase):
    @pytest.mark.slow
    def test_every_candidate_takes_steps_and_is_reported(self):
        shapes = [(9, 8), (8,)]
        result = optimizer_step.measure(shapes, "float32", rounds=2, modes=("xla", "jit", "graph"))
        rows = {(r["name"], r["mode"]): r for r in result["rows"]}
        for name in ("Keras SGD+momentum", "LARS (ours)", "LAMB (ours)", "straightforward LARS", "Keras Lamb"):
            for mode in ("xla", "graph"):
                self.assertGreater(rows[name, mode]["milliseconds"], 0)
        self.assertEqual(rows["Keras SGD+momentum", "xla"]["times_sgd"], 1.0)
        self.assertEqual(result["parameters"], sum(map(math.prod, shapes)))
        for name, mode in rows:
            self.assertIn(name, optimizer_step.table("tiny", result))
            self.assertIn(mode, optimizer_step.table("tiny", result))

    def test_straightforward_lars_is_lars(self):
        """Else it would be no yardstick."""
        results = []
        for name in ("LARS (ours)", "straightforward LARS"):
            rng, (_, optimizer) = np.random.default_rng(0), optimizer_step.keras_optimizers()[name]
            first = [np.float32(rng.normal(size=shape)) for shape in ((4, 3), (3,))]
            variables = [keras.Variable(w, name=f"k{i}") for i, w in enumerate(first)]
            for _ in range(3):
                gradients = [np.float32(rng.normal(size=w.shape)) for w in first]
                optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], variables)
            results.append([keras.ops.convert_to_numpy(v) for v in variables])
        for w, ours, theirs in zip(first, *results, strict=True):
            self.assertGreater(np.abs(ours - w).max(), 1e-3)
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


class HostTimeTest(absltest.TestCase):
    def test_both_loops_take_every_update(self):
        taken = {}
        for name, take in host_time.loops(lambda: host_time.chain(2), updates=3).items():
            indices = taken[name] = []
            take(keras.callbacks.LambdaCallback(on_train_batch_end=lambda i, logs, indices=indices: indices.append(i)))
        self.assertEqual(taken, {"Trainer": [0, 1, 2], "Keras fit": [0, 1, 2]})

    def test_time_between_updates(self):
        clock = mock.Mock(perf_counter=mock.Mock(side_effect=[0.0, 5.0, 5.5, 6.5, 10.0, 10.25, 10.5, 12.5]))
        intervals = host_time.Intervals(warm_up=2)
        with mock.patch.object(host_time, "time", clock):
            for _ in range(2):
                intervals.on_train_begin()
                for i in range(4):
                    intervals.on_train_batch_end(i)
        self.assertEqual(intervals.seconds, [0.5, 1.0, 0.25, 2.0])


if __name__ == "__main__":
    absltest.main()
