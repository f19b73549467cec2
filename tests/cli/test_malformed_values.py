"""Malformed arguments of the library and of its programs, in tables: a ValueError that names them, or exit 2.

They are 351. `test_malformed.py` has 439 more, and `tests/training` has 54 of data and sizes.
"""

import contextlib
import io
import json
import pathlib
import tempfile

import numpy as np
import tensorflow as tf

import lars_keras.report.__main__ as report
from lars_keras import LAMB, LARS
from lars_keras.files import local_path
from lars_keras.noise_scale import check_ghost_batches
from lars_keras.report import batch_size
from lars_keras.runtime.checkpoint import CheckpointManager, SavePolicy
from lars_keras.runtime.folder_lock import lock_folder
from lars_keras.schedules import WarmupCosine, WarmupExponential, WarmupPolynomial, WarmupStep, duration_in_updates
from lars_keras.training.sizes import epoch_ends, split_batch

NO_NUMBERS = (None, "1", "", [1], {}, float("nan"), float("inf"), -1, True, 1j, np.array([1, 2]), np.nan, object())
NO_COUNTS = (*NO_NUMBERS, 1.5, np.float32(2))

# A call with each value of a table in the place of one argument; the message names the argument, or begins with it.
WITH = {
    "peak": (lambda v: WarmupCosine(v, 1, 10), NO_NUMBERS),
    "start": (lambda v: WarmupCosine(1.0, 1, 10, start=v), NO_NUMBERS),
    "end": (lambda v: WarmupPolynomial(1.0, 1, 10, end=v), NO_NUMBERS),
    "power": (lambda v: WarmupPolynomial(1.0, 1, 10, power=v), NO_NUMBERS),
    "warmup_updates": (lambda v: WarmupCosine(1.0, v, 10), NO_COUNTS),
    "total_updates": (lambda v: WarmupExponential(1.0, 1, v, end=0.1), NO_COUNTS),
    "boundaries": (lambda v: WarmupStep(1.0, 0, v), (None, 3, "3", [1.5], [3, 2], [2, 2], [-1], ["a"], {"a": 1})),
    "factor": (lambda v: WarmupStep(1.0, 0, [3], v), (*NO_NUMBERS, 0.0, 2.0)),
    "A duration": (  # is an argument of flags, too, of other names
        lambda v: duration_in_updates(v, batch_size=8, num_examples=80),
        ("", "five", "-1 epochs", "1 hour", "1.5 steps", "nan", "inf epochs", "1e400", "1 2", "--", None, []),
    ),
    "batch_size": (lambda v: duration_in_updates("1 epochs", batch_size=v, num_examples=80), (*NO_COUNTS, 0)),
    "num_examples": (lambda v: duration_in_updates("1 epochs", batch_size=8, num_examples=v), (*NO_COUNTS, 0)),
    "momentum": (lambda v: LARS(momentum=v), (*NO_NUMBERS, 1.0)),
    "trust_coefficient": (lambda v: LARS(trust_coefficient=v), (*NO_NUMBERS, 0.0)),
    "weight_decay": (lambda v: LARS(weight_decay=v), NO_NUMBERS[1:]),  # None is 0
    "excluded_lr_scale": (lambda v: LARS(excluded_lr_scale=v), NO_NUMBERS),
    "exclude": (lambda v: LARS(exclude=v), ("bias", 3, ["("], [None], [3])),
    "variant": (lambda v: LARS(variant=v), (None, "", "nadam", 3)),
    "beta_1": (lambda v: LAMB(1.0, beta_1=v), (*NO_NUMBERS, 1.0)),
    "learning_rate": (lambda v: LARS(v), (None, "1", "", [1], float("nan"), -1, True)),
    "epochs": (lambda v: epoch_ends(v, 3), NO_NUMBERS),
    "steps_per_epoch": (lambda v: epoch_ends(1, v), (*NO_NUMBERS, 0)),
    "`batch_size`": (lambda v: split_batch(v, 4, None), (0, -4, 6)),
    "microbatch_size": (lambda v: split_batch(32, 4, v), (0, -1, 3, 5)),
    "updates": (lambda v: SavePolicy(updates=v), (*NO_COUNTS[1:], 0)),
    "minutes": (lambda v: SavePolicy(minutes=v), NO_NUMBERS[1:]),
    "max_to_keep": (lambda v: CheckpointManager("x", max_to_keep=v), (*NO_COUNTS, 0)),
    "run_dir": (
        lambda v: local_path(v, "run_dir"),
        ("gs://b/r", "s3://b/r", "hdfs://h/r", "file:///r", "gs:/b/r", "https://h/r", "~nobody-of-this-name/r"),
    ),
    "directory": (lambda v: CheckpointManager(v), ("gs://b/r", "s3://b", "~nobody-of-this-name")),
    "`microbatch_size`": (lambda v: check_ghost_batches(v, v), (1, 8)),
}


class TablesTest(tf.test.TestCase):
    def test_arguments(self):
        count = 0
        for name, (call, values) in WITH.items():
            for value in values:
                with self.subTest(f"{name}={value!r}"):
                    with self.assertRaises(ValueError) as raised:
                        call(value)
                    argument = name.strip("`")
                    named = f"^{name}" if " " in name else rf"`{argument}`|\b{argument}="
                    self.assertRegex(str(raised.exception), named)
                count += 1
        self.assertGreater(count, 320)

    def test_run_folders(self):
        """Both programs that read a run folder refuse it, with exit code 2 and one line."""
        root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        logs = (b"", b"\xff\xfe", b"{", b"[]\n", b"3\n", b"null\n", b'{"update": "x"}\n', b'{"kind": 3}\n' * 3)
        names = ["none", "file", "gs://bucket/run", "~nobody-of-this-name", "empty"]
        (root / "file").write_text("")
        (root / "empty").mkdir()
        for i, content in enumerate(logs):
            folder = root / f"log{i}"
            folder.mkdir()
            (folder / "metrics.jsonl").write_bytes(content)
            (folder / "results.json").write_text(json.dumps({"updates": 1}) if i % 2 else "{")
            names.append(folder.name)
        for name in names:
            run = name if name.startswith(("gs", "~")) else str(root / name)
            for program, arguments in ((report.main, [run]), (batch_size.main, [run, "64"])):
                with self.subTest(f"{program.__module__} {name}"):
                    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
                        code = program(arguments)
                    self.assertEqual(code, 2)
                    self.assertRegex(err.getvalue(), r"\A[^\n]+\n\Z")

    def test_folders_that_cannot_be_locked(self):
        root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        (root / "file").write_text("")
        for path in (root / "file", root / "file" / "run"):
            with self.assertRaises(OSError), lock_folder(path, "run_dir"):
                pass


if __name__ == "__main__":
    tf.test.main()
