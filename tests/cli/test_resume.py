"""A run that was interrupted goes on exactly, or says why it does not."""

import json
import os
import pathlib
import shutil
import signal
import tempfile
import time
import unittest.mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from flags import RunConfig
from lars_keras.runtime.checkpoint import CheckpointManager
from lars_keras.runtime.errors import UsageError
from lars_keras.runtime.folder_lock import lock_folder
from lars_keras.training import Trainer
from running import callbacks, renamed, score
from running.resume import RunCheckpoints, config_of_flags, flags_of_run, refuse_finished, resume
from tests.cli.runs import SMALL, few_digits, run

RUN = (*SMALL, "--epochs=6", "--eval_every=3", "--ema_momentum=0.5", "--trust_epsilon=1e-6", "--strategy=single")
# A flags.txt as it was written before flags were renamed, with flags that mean nothing to the optimizer.
EARLIER_FLAGS = """\
--model=lenet1989
--dataset=digits
--validation_share=0.25
--cache=none
--batch_size=64
--epochs=8.0
--optimizer=adam
--learning_rate=0.01
--schedule=cosine
--power=2.0
--end_learning_rate=0.0
--warmup_epochs=100 steps
--momentum=0.9
--nesterov=false
--weight_decay=0.0005
--trust_coefficient=0.001
--epsilon=0.0
--variant=paper
--trust_clip=false
--excluded_lr_scale=0.05
--ema=0.9
--label_smoothing=0.0
--strategy=one
--shard_update=false
--reduce_dtype=float32
--updates_per_call=2
--max_bad_images=7
--seed=0
"""


class Stop(keras.callbacks.Callback):
    """Takes the place of the progress bar, and sends SIGTERM during update 5."""

    images_per_second = data_wait = 1.0

    def on_train_batch_begin(self, batch, logs=None):
        if batch + 1 == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def metrics(run_dir):
    """Return the log without its times and notes."""
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second", "data_wait")
    return [{k: v for k, v in e.items() if k not in timed} for e in events if e["event"] != "note"]


def by_earlier_names(values, names):
    before = {now: then for then, now in names.items()}
    return {before.get(name, name): value for name, value in values.items()}


def make_earlier(run_dir):
    """Write a run folder again with the names of before the renames."""
    path = run_dir / "flags.txt"
    flags = dict(line.removeprefix("--").split("=", 1) for line in path.read_text().splitlines())
    flags = by_earlier_names(flags | {"strategy": "one", "nesterov": "false"}, renamed.FLAGS)
    path.write_text("".join(f"--{name}={value}\n" for name, value in flags.items()))
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(by_earlier_names(config | {"strategy": "one"}, renamed.FLAGS)))
    checkpoints = CheckpointManager(run_dir / "checkpoints")
    saved = checkpoints.latest()
    metadata = dict(saved.metadata)
    metadata["flags"] = by_earlier_names(metadata["flags"] | {"strategy": "one"}, renamed.FLAGS)
    for new in ("beta_2", "adam_epsilon", "bias_correction", "bias_lr_scale"):
        metadata["flags"].pop(new)
    position = by_earlier_names(metadata["position"], renamed.POSITION)
    metadata["position"] = position | {"logs": by_earlier_names(position["logs"], renamed.METRICS)}
    shutil.rmtree(run_dir / "checkpoints")
    checkpoints.save(saved.update, saved.arrays, metadata)
    checkpoints.wait()


class RunTest(tf.test.TestCase):
    """Real runs: one whole, and one that was preempted after update 5."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.dir = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        with unittest.mock.patch.object(callbacks, "Progress", Stop):
            cls.stopped = run(*RUN, f"--run_dir={cls.dir}/stopped")
        cls.whole = run(*RUN, f"--run_dir={cls.dir}/whole")

    def test_it_was_saved(self):
        code, out, err = self.stopped
        self.assertEqual(code, 75, out + err)
        self.assertIn("stopped after update 5, saved", err)
        self.assertLen(list((self.dir / "stopped/checkpoints").glob("update-00000005-*.npz")), 1)

    def test_it_goes_on_exactly(self):
        shutil.copytree(self.dir / "stopped", self.dir / "resumed")
        self.check_resumed(self.dir / "resumed")

    def test_it_is_evaluated_more_often(self):
        path = self.dir / "evaluated"
        shutil.copytree(self.dir / "stopped", path)
        code, _, err = run(f"--run_dir={path}", "--eval_every=1")
        self.assertEqual(code, 0, err)
        more, whole = metrics(path), metrics(self.dir / "whole")
        self.assertLen([e for e in more if e["event"] == "eval"], 5)  # after epochs 2 to 6
        self.assertEqual(*([e for e in events if e["event"] == "update"] for events in (more, whole)))
        self.assertEqual(more[-1], whole[-1])

    def test_a_folder_of_an_earlier_version_goes_on_exactly(self):
        shutil.copytree(self.dir / "stopped", self.dir / "earlier")
        make_earlier(self.dir / "earlier")
        self.assertIn("--warmup_epochs=0\n", (self.dir / "earlier/flags.txt").read_text())
        self.check_resumed(self.dir / "earlier")
        self.assertEqual(*((self.dir / name / "flags.txt").read_text() for name in ("earlier", "whole")))

    def test_an_unfinished_run_is_scored(self):
        code, out, err = run(f"--run_dir={self.dir}/stopped", "--eval_only")
        self.assertEqual(code, 0, err)
        self.assertRegex(out, r"after update 5:\ntop-1 .*n=37")

    def test_a_run_that_goes_on_is_scored_whatever_the_times_of_its_files(self):
        """Its model is that of its earlier end, as after a copy of the folder."""
        path = self.dir / "copied"
        shutil.copytree(self.dir / "stopped", path)
        shutil.copy(self.dir / "whole/model.keras", path)
        code, out, err = run(f"--run_dir={path}", "--eval_only")
        self.assertEqual(code, 0, err)
        self.assertIn("after update 5:", out)

    def test_an_unfinished_run_is_scored_with_the_statistics_that_it_trains_with(self):
        """Leave out those of the held-out images, although the test split is scored. Take the saved ones, if any."""

        def load(name, *, validation_split, **_):
            data = few_digits()
            data.mean = (100 * validation_split,)
            return data

        path = self.dir / "held_out"
        shutil.copytree(self.dir / "stopped", path)
        with open(path / "flags.txt", "a") as file:
            file.write("--validation_split=0.25\n")
        config = json.loads((path / "config.json").read_text())
        for saved, mean in ((config["data"], few_digits().mean), ({}, (25.0,))):  # {} as by an earlier version
            (path / "config.json").write_text(json.dumps(config | {"data": saved}))
            with unittest.mock.patch.object(score, "make_model", wraps=score.make_model) as make_model:
                code, out, err = run(f"--run_dir={path}", "--eval_only", data=load)
            self.assertEqual(code, 0, err)
            self.assertEqual(make_model.call_args.args[1].mean, mean)
            self.assertIn("n=37", out)

    def test_a_finished_run_goes_on(self):
        path = self.dir / "extended"
        shutil.copytree(self.dir / "whole", path)
        self.assertLen(list(path.glob("checkpoints/update-00000015-*.npz")), 1)
        code, _, err = run(f"--run_dir={path}")
        self.assertEqual(code, 2)
        self.assertIn("holds a finished run", err)
        code, _, err = run(f"--run_dir={path}", "--epochs=8")
        self.assertEqual(code, 2)
        self.assertIn("--epochs=8.0 was 6.0", err)  # the rates of the finished updates would have been others
        code, out, err = run(f"--run_dir={path}", "--epochs=8", "--allow_inexact_resume")
        self.assertEqual(code, 0, err)
        self.assertIn("went on after update 15", out)
        self.assertEqual(json.loads((path / "results.json").read_text())["updates"], 20)
        self.assertEqual(json.loads((path / "results-00000015.json").read_text())["updates"], 15)

    def test_killed_after_a_change(self):
        """It goes on without flags, as its checkpoint has the new ones."""
        path = self.dir / "changed"
        shutil.copytree(self.dir / "stopped", path)
        killed = unittest.mock.patch.object(Trainer, "_execute", side_effect=KeyboardInterrupt)
        with killed, self.assertRaises(KeyboardInterrupt):
            run(f"--run_dir={path}", "--learning_rate=5", "--allow_inexact_resume")
        code, out, err = run(f"--run_dir={path}")
        self.assertEqual(code, 0, err)
        self.assertIn("--learning_rate=5", (path / "flags.txt").read_text())
        self.assertIn("went on after update 5", out)

    def test_a_folder_in_use(self):
        path = self.dir / "used"
        with lock_folder(path, "run_dir"):
            code, _, err = run(*RUN, f"--run_dir={path}")
        self.assertEqual(code, 2)
        self.assertIn(f"--run_dir is in use by process {os.getpid()} on ", err)
        self.assertFalse(path.exists())

    def check_resumed(self, run_dir):
        code, out, err = run(f"--run_dir={run_dir}")
        self.assertEqual(code, 0, err)
        self.assertRegex(out, "went on after update 5, from update-00000005-.*npz")
        report = (run_dir / "report.html").read_text()
        self.assertIn("went on after update 5", report)
        self.assertNotIn("inexactly", report)
        self.assertEqual(self.whole[0], 0, self.whole)
        self.assertEqual(metrics(run_dir), metrics(self.dir / "whole"))
        results = [json.loads((path / "results.json").read_text()) for path in (run_dir, self.dir / "whole")]
        self.assertEqual(*({k: r[k] for k in ("top1", "top5", "loss", "n", "updates")} for r in results))


class RefusalTest(parameterized.TestCase, tf.test.TestCase):
    """Refusals before any training, of a folder with a checkpoint of update 5."""

    def setUp(self):
        super().setUp()
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.config = RunConfig(run_dir=str(self.dir), batch_size=64)
        model = keras.Sequential([keras.layers.Input([1]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        self.trainer = Trainer(model, batch_size=64)
        self.trainer.restore = unittest.mock.Mock()
        self.data = few_digits()

    def save(self, **changes):
        flags = {"flags": vars(self.config) | {"exclude": ["a", "b"]}, "replicas": 1, "rollbacks": ["one"]}
        position = {"update": 5, "batches_consumed": 6, "logs": {}}
        checkpoints = CheckpointManager(self.dir / "checkpoints")
        checkpoints.save(5, {"a": np.zeros(3)}, flags | {"position": position} | changes)
        checkpoints.wait()

    def resume(self, **flags):
        config = RunConfig(**vars(self.config) | {"exclude": ("a", "b")} | flags)
        return resume(config, RunCheckpoints(self.dir, config), self.dir, self.trainer, self.data, "feed")

    def refuse(self, *messages, **flags):
        with self.assertRaises(UsageError) as raised:
            self.resume(**flags)
        self.trainer.restore.assert_not_called()
        for message in (f"--run_dir={self.dir} ", *messages):
            self.assertIn(message, str(raised.exception))

    def test_the_same_flags_go_on(self):
        self.save()
        # Not for the result: where the data are. Without a meaning: Adam's second moment.
        resumed = self.resume(data_dir="elsewhere", beta_2=0.5)
        self.assertLen(resumed.notes, 1)
        self.assertRegex(resumed.notes[0], "^went on after update 5, from update-00000005-.*npz$")
        arrays, position, feed = self.trainer.restore.call_args.args
        self.assertEqual((list(arrays), position["batches_consumed"], feed), (["a"], 6, "feed"))
        self.assertEqual(position["rollbacks"], ["one"])  # where earlier versions saved them

    def test_an_empty_folder_begins(self):
        self.assertEqual(self.resume().notes, [])

    def test_a_dry_run_begins_at_the_start(self):
        self.save()
        self.assertEqual(self.resume(dry_run=True, seed=3).notes, [])
        self.trainer.restore.assert_not_called()

    def test_other_flags(self):
        self.save()
        self.refuse(
            "--batch_size=32 was 64; --seed=3 was 0.",
            "--allow_inexact_resume",
            batch_size=32,
            seed=3,
            allow_inexact_resume=False,
        )
        self.refuse("--optimizer=adam was lars", optimizer="adam")
        resumed = self.resume(weight_decay=0.01, allow_inexact_resume=True)
        self.assertEqual(resumed.notes[1:], ["went on inexactly: --weight_decay=0.01 was 0.0005"])

    def test_another_length_with_the_same_rates(self):
        """The rate is the same throughout, whatever the length."""
        self.config = RunConfig(
            run_dir=str(self.dir), batch_size=64, warmup="0", learning_rate=0.1, end_learning_rate=0.1
        )
        self.save()
        self.assertLen(self.resume(epochs=7.0).notes, 1)

    def test_a_finished_run_without_its_last_state(self):
        self.save()
        (self.dir / "results.json").write_text('{"updates": 9}')
        self.refuse("holds a finished run without a checkpoint of its last state", epochs=70.0)

    def test_a_finished_run_of_another_length(self):
        (self.dir / "results.json").write_text('{"updates": 5}')
        (self.dir / "flags.txt").write_text("--epochs=2.0\n")
        with self.assertRaisesRegex(UsageError, "or more --epochs, .* to go on with it"):
            refuse_finished(self.dir, RunConfig(epochs=2.0))
        refuse_finished(self.dir, RunConfig(epochs=3.0))
        self.save()
        self.refuse("has taken 5 updates, all of the 5 that the flags", steps=5, allow_inexact_resume=True)
        self.refuse("--steps=9 was None. Give it another --run_dir to start anew, or --allow_inexact", steps=9)

    def test_a_finished_run_of_so_many_steps(self):
        """More --epochs would not extend it."""
        (self.dir / "results.json").write_text('{"updates": 5}')
        (self.dir / "flags.txt").write_text("--epochs=2.0\n--steps=5\n")
        more = "or more --steps, with --allow_inexact_resume where the schedule depends on the length"
        with self.assertRaisesRegex(UsageError, more):
            refuse_finished(self.dir, RunConfig(epochs=2.0, steps=5))
        self.config = RunConfig(run_dir=str(self.dir), batch_size=64, steps=5)
        self.save()
        self.refuse(more, epochs=99.0)

    def test_other_replicas_and_backend(self):
        self.save(replicas=2)
        self.refuse("replicas: 1, was 2")
        self.save(backend="jax")
        self.refuse("KERAS_BACKEND=tensorflow, was jax")

    def test_other_data(self):
        """The run would go on with another permutation of them, and another length of an epoch."""
        self.save(data="160 train and 36 test images in 10 classes, 0123")
        now = "data: 160 train and 37 test images in 10 classes, [0-9a-f]{16}"
        with self.assertRaisesRegex(UsageError, f"{now}, was 160 train and 36 test images in 10 classes, 0123"):
            self.resume()
        resumed = self.resume(allow_inexact_resume=True)
        self.assertRegex(resumed.notes[1], f"^went on inexactly: {now}, was")
        self.save(data=resumed.record["data"])
        self.assertLen(self.resume().notes, 1)

    def test_an_end_that_is_past(self):
        self.save()
        self.refuse("has taken 5 updates, more than the 4 ", steps=4, allow_inexact_resume=True)

    def test_only_damaged_checkpoints(self):
        """The run would begin anew, and write over what is left of it."""
        self.save()
        (path,) = (self.dir / "checkpoints").iterdir()
        path.write_bytes(path.read_bytes()[:-9])
        self.refuse(f"whose checkpoints are all damaged; the newest is {path.name}")
        path.unlink()
        self.assertEqual(self.resume().notes, [])

    def test_unreadable_images_are_known_again(self):
        self.save()
        (self.dir / "bad_images.json").write_text('{"record 3": "no JPEG"}')
        self.resume()
        self.assertEqual(self.data.unreadable_images.found, {"record 3": "no JPEG"})

    def test_a_finished_run(self):
        refuse_finished(self.dir)
        (self.dir / "results.json").touch()
        with self.assertRaisesRegex(UsageError, f"--run_dir={self.dir} holds a finished run"):
            refuse_finished(self.dir)


class EarlierVersionTest(tf.test.TestCase):
    def test_flags_by_todays_names(self):
        config = config_of_flags(EARLIER_FLAGS.splitlines())
        self.assertEqual(
            (config.validation_split, config.warmup, config.ema_momentum, config.strategy, config.steps_per_execution),
            (0.25, "100 steps", 0.9, "single", 2),
        )
        self.assertEqual(config.max_unreadable_images, 7)
        self.assertEqual((config.optimizer, config.trust_epsilon, config.beta_2), ("adam", 0.0, 0.999))
        for name in (*renamed.FLAGS, "nesterov", "trust_epsilon", "power"):
            self.assertNotIn(f"--{name}=", config.as_flags())

    def test_flags_of_run(self):
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.assertEqual(flags_of_run(str(folder)), [])
        (folder / "flags.txt").write_text(EARLIER_FLAGS)
        self.assertIn("--warmup=100 steps", flags_of_run(str(folder)))
        code, _, err = run(f"--run_dir={folder}", "--nesterov")  # what the user gives is refused as ever
        self.assertEqual(code, 2)
        self.assertIn("--nesterov needs --optimizer=lars or momentum", err)


if __name__ == "__main__":
    tf.test.main()
