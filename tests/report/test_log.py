"""What a run shows and keeps while it trains: the progress lines and the metrics log."""

import io
import json
import math
import pathlib
import sys
import tempfile
import time
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from lars_keras.report import log as log_module
from lars_keras.report.progress import Progress
from lars_keras.report.throughput import Throughput
from lars_keras.training import Trainer

STEPS, PER_EPOCH, BATCH = 6, 3.0, 100


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def logs_of(update: int) -> dict[str, float]:
    """Made-up metrics of the update with this index."""
    return {
        "loss": 2.0 / (update + 1),
        "step_loss": 1.5 / (update + 1),
        "top1": 0.1 * update,
        "top5": 0.15 * update,
        "learning_rate": 0.5 * update,
    }


def drive(callbacks, clock, *, first=0, stop=STEPS, compiling=30.0, seconds=2.0, evaluating=50.0):
    """Call what a trainer calls: one update a call, an evaluation after each epoch."""
    callback_list = keras.callbacks.CallbackList(
        callbacks,
        epochs=STEPS / PER_EPOCH,
        steps=STEPS,
        batch_size=BATCH,
        steps_per_epoch=PER_EPOCH,
        first_update=first,
    )
    callback_list.on_train_begin()
    for update in range(first, stop):
        if update % PER_EPOCH == 0:
            callback_list.on_epoch_begin(int(update // PER_EPOCH))
        clock.now += compiling if update == first else seconds
        callback_list.on_train_batch_end(update, logs_of(update))
        if (update + 1) % PER_EPOCH == 0:
            clock.now += evaluating
            scores = {"val_loss": 0.25, "val_top1": 0.9725, "val_top5": 0.999, "val_n": 450.0}
            callback_list.on_epoch_end(int(update // PER_EPOCH), {**logs_of(update), **scores})
    callback_list.on_train_end()


class ThroughputTest(tf.test.TestCase):
    def test_leaves_out_compilation_and_evaluation(self):
        clock = FakeClock()
        speed = Throughput(batch_size=100, first_update=10, clock=clock)
        clock.now += 60
        speed.record(11)  # compiled
        self.assertTrue(math.isnan(speed.images_per_second))
        clock.now += 2
        speed.record(12)
        clock.now += 500
        speed.restart()
        clock.now += 8
        speed.record(16)  # one call of four updates
        self.assertEqual(speed.images_per_second, 500 / 10)
        self.assertTrue(math.isnan(speed.data_wait))  # nobody told

    def test_share_of_waiting_for_data(self):
        clock = FakeClock()
        speed = Throughput(batch_size=100, clock=clock)
        for seconds, finished, waited in ((60, 1, 50.0), (2, 2, 1.0), (6, 3, 1.0)):
            clock.now += seconds
            speed.record(finished, waited)
        self.assertEqual(speed.data_wait, 2 / 8)

    def test_time_left_counts_evaluations_but_not_compilation(self):
        clock = FakeClock()
        speed = Throughput(batch_size=100, clock=clock)
        self.assertTrue(math.isnan(speed.seconds_left(9)))
        for seconds, finished in ((60, 1), (2, 2), (2, 3)):
            clock.now += seconds
            speed.record(finished)
        clock.now += 4
        speed.restart()
        self.assertEqual(speed.seconds_left(9), 6 * (2 + 2 + 4) / 2)


class ProgressTest(tf.test.TestCase):
    def lines(self, **kwargs) -> list[str]:
        clock, file = FakeClock(), io.StringIO()
        drive([Progress(file, clock=clock)], clock, **kwargs)
        self.assertNotIn("\r", file.getvalue())
        return file.getvalue().splitlines()

    def test_plain_lines(self):
        first, *rest = self.lines(compiling=30.0, seconds=4.0, evaluating=3.0)
        self.assertEqual(first, "update 1/6  17 %  loss 2  top-1 0.0 %  rate 0")
        score = "val top-1 97.2 %  top-5 99.9 %  loss 0.25  n=450"
        self.assertEqual(rest[0], f"epoch 1/2  update 3/6  {score}")
        # 15 s since the first line: 300 images in 12 s of training, 2 more updates at 15 s / 3.
        middle = "update 4/6  67 %  ETA 00:10  25 images/s  loss 0.5  top-1 30.0 %  rate 1.5"
        self.assertEqual(rest[1:], [middle, f"epoch 2/2  update 6/6  {score}"])

    def test_plain_lines_are_rare(self):
        lines = self.lines(compiling=1.0, seconds=0.001, evaluating=0.0)
        self.assertLen(lines, 3)  # the first update and two evaluations

    def test_bar_on_a_terminal(self):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        clock, file = FakeClock(), Terminal()
        bar = Progress(file, clock=clock)
        drive([bar], clock, first=3)
        self.assertEqual(bar.images_per_second, 50.0)
        shown = file.getvalue()
        self.assertIn(" 50 %|", shown)
        self.assertIn("3/6, compiling", shown)
        self.assertIn("100 %|", shown)
        self.assertIn("6/6, ETA 00:00  50 images/s  loss 0.3333  top-1 50.0 %  rate 2.5", shown)
        self.assertIn("epoch 2/2  update 6/6  val top-1 97.2 %", shown)


class MetricsLogTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.run_dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.run_dir / "metrics.jsonl"
        self.clock = FakeClock()

    def run_log(self, **kwargs):
        drive([log_module.MetricsLog(self.run_dir, self.clock)], self.clock, **kwargs)

    def read(self) -> list[dict]:
        def refuse(name):
            raise ValueError(f"{name} is no JSON")

        lines = self.path.read_text().splitlines()
        return [json.loads(line, parse_constant=refuse) for line in lines]

    def test_lines(self):
        self.run_log()
        events = self.read()
        self.assertEqual([e["event"] for e in events], (["update"] * 3 + ["eval"]) * 2)
        self.assertEqual(
            events[4],
            {
                "event": "update",
                "update": 4,
                "epoch": 4 / 3,
                **logs_of(3),
                "images_per_second": 50.0,
                "data_wait": None,  # these logs do not tell
                "seconds": 30.0 + 2 * 2.0 + 50.0 + 2.0,
            },
        )
        self.assertIsNone(events[0]["images_per_second"])
        score = {"loss": 0.25, "top1": 0.9725, "top5": 0.999, "n": 450}
        self.assertEqual(events[3], {"event": "eval", "update": 3, "epoch": 1.0, **score})

    def test_metrics_of_a_model_of_ones_own(self):
        log = log_module.MetricsLog(self.run_dir, self.clock)
        log.set_params({"batch_size": BATCH, "first_update": 0, "steps_per_epoch": PER_EPOCH})
        log.on_train_begin()
        log.on_train_batch_end(0, {"loss": 1.0, "auc": np.float32(0.5), "f1": np.ones(3), "data_wait": 0.0})
        log.on_epoch_end(0, {"loss": 1.0, "val_loss": 2.0, "val_auc": 0.75, "val_f1": np.ones(3), "val_n": 8.0})
        log.on_train_end()
        update, score = self.read()
        self.assertEqual((update["loss"], update["auc"], update["step_loss"]), (1.0, 0.5, None))
        self.assertEqual(score, {"event": "eval", "update": 1, "epoch": 1 / 3, "loss": 2.0, "auc": 0.75, "n": 8})
        self.assertNoCommonElements(update, ("f1", "top1", "n"))

    def test_metrics_with_names_of_the_log(self):
        log = log_module.MetricsLog(self.run_dir, self.clock)
        log.set_params({"batch_size": BATCH, "first_update": 0, "steps_per_epoch": PER_EPOCH})
        log.on_train_begin()
        log.on_train_batch_end(0, {"loss": 1.0, "epoch": 7.5, "update": 8.5, "event": 9.5})
        log.on_epoch_end(0, {"loss": 1.0, "val_loss": 2.0, "val_epoch": 6.5, "val_n": 8.0})
        log.on_train_end()
        update, score = self.read()
        own = "event", "update", "epoch"
        self.assertEqual([update[name] for name in own], ["update", 1, 1 / 3])
        self.assertEqual([update[f"metric/{name}"] for name in own], [9.5, 8.5, 7.5])
        self.assertEqual((score["epoch"], score["metric/epoch"]), (1 / 3, 6.5))

    def test_resume_replaces_what_came_after(self):
        self.run_log()
        whole = self.read()
        with self.path.open("a") as file:
            file.write('{"event": "upd')  # torn by a crash
        self.run_log(first=4, compiling=9.0)
        events = self.read()
        self.assertEqual([e["update"] for e in events], [1, 2, 3, 3, 4, 5, 6, 6])
        self.assertEqual(events[:5], whole[:5])
        self.assertEqual(events[5]["seconds"], whole[4]["seconds"] + 9.0)
        self.assertIsNone(events[5]["images_per_second"])

    def test_a_note_beyond_the_checkpoint_stays(self):
        """A damaged image is told once in a run, also if the run falls back behind that."""
        self.run_log(stop=4)
        log_module.MetricsLog(self.run_dir, self.clock).note(4, "left out an image")
        self.run_log(first=2, stop=3)
        events = [(e["event"], e["update"]) for e in self.read()]
        self.assertEqual(events, [("update", 1), ("update", 2), ("note", 4), ("update", 3), ("eval", 3)])

    def test_notes_do_not_read_the_whole_log_again(self):
        log = log_module.MetricsLog(self.run_dir, self.clock)
        drive([log], self.clock, stop=2)
        with mock.patch.object(log_module, "read_metrics", side_effect=AssertionError):
            for text in ("first", "second", "first"):
                log.note(2, text)
        self.assertEqual([e["text"] for e in self.read() if e["event"] == "note"], ["first", "second"])

    def test_damaged_lines_are_skipped(self):
        self.run_log(stop=2)
        whole = self.path.read_bytes()
        self.path.write_bytes(b'1\n{"a": 2}\n' + whole + b'{"event": "note", "update": 2, "text": "\xff"}\n')
        self.assertEqual([e["update"] for e in log_module.read_metrics(self.path)], [1, 2])

    def test_a_note_after_a_line_that_is_torn(self):
        self.run_log(stop=2)
        with open(self.path, "a") as file:
            file.write('{"event": "upd')
        log_module.MetricsLog(self.run_dir, self.clock).note(2, "went on after update 2")
        self.assertIn(("note", 2), [(e["event"], e["update"]) for e in log_module.read_metrics(self.path)])

    def test_a_full_disk_at_the_start_ends_no_run(self):
        """As after a rollback: what was logged stays."""
        self.run_log(stop=2)
        before = self.path.read_text()
        full = OSError(28, "No space left on device")
        with (
            mock.patch.object(log_module, "atomic_write_text", side_effect=full),
            mock.patch.object(log_module, "_tensorboard_writers", side_effect=full),
            self.assertLogs(level="ERROR") as logged,
        ):
            self.run_log(first=1, stop=2)
        self.assertLen(logged.output, 2)
        self.assertTrue(self.path.read_text().startswith(before))

    def test_resume_at_an_epochs_end_keeps_one_evaluation(self):
        self.run_log(stop=3)
        log = log_module.MetricsLog(self.run_dir, self.clock)
        log.set_params({"batch_size": BATCH, "first_update": 3, "steps_per_epoch": PER_EPOCH})
        log.on_train_begin()
        log.on_epoch_end(0, {"val_loss": 0.25, "val_top1": 0.5, "val_top5": 0.5, "val_n": 450.0})
        log.on_train_end()
        self.assertEqual([e["event"] for e in self.read()], ["update"] * 3 + ["eval"])

    def test_new_run_starts_an_empty_log(self):
        self.run_log()
        self.run_log(stop=1)
        self.assertEqual([e["update"] for e in self.read()], [1])

    def test_a_second_training_keeps_the_log_of_the_first(self):
        log, data = log_module.MetricsLog(self.run_dir, self.clock), (np.ones((16, 1)), np.ones((16, 1)))
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        for epochs in (2, 2, 1):
            model.compile("sgd", "mse")
            Trainer(model, batch_size=8).fit(*data, epochs=epochs, callbacks=log, verbose=0)
        self.assertEqual([e["update"] for e in self.read()], [1, 2])
        for name in ("metrics-4", "metrics-4-2"):
            kept = log_module.read_metrics(self.run_dir / f"{name}.jsonl")
            self.assertEqual([e["update"] for e in kept], [1, 2, 3, 4])

    def test_not_finite_is_null(self):
        log = log_module.MetricsLog(self.run_dir, self.clock)
        log.set_params({"batch_size": BATCH, "first_update": 0, "steps_per_epoch": PER_EPOCH})
        log.on_train_begin()
        log.on_train_batch_end(0, {**logs_of(0), "loss": math.nan, "step_loss": math.inf})
        log.on_train_end()
        (event,) = self.read()
        self.assertIsNone(event["loss"])
        self.assertIsNone(event["step_loss"])
        self.assertEqual(event["top5"], 0.0)

    def test_tensorboard_scalars(self):
        self.run_log()
        found = {}
        for run in ("train", "validation"):
            paths = map(str, sorted((self.run_dir / "tensorboard" / run).iterdir()))
            for record in tf.data.TFRecordDataset(list(paths)):
                event = tf.compat.v1.Event.FromString(record.numpy())
                for value in event.summary.value:
                    number = float(tf.make_ndarray(value.tensor))
                    found.setdefault((run, value.tag), []).append((event.step, number))
        self.assertAllClose(found["train", "learning_rate"], [(u + 1, 0.5 * u) for u in range(6)])
        self.assertAllClose(found["validation", "top1"], [(3, 0.9725), (6, 0.9725)])
        self.assertLen(found["train", "images_per_second"], 5)

    def test_tensorboard_has_each_update_once(self):
        self.run_log(stop=5)
        time.sleep(1.1)  # files of one second are read in the order of their names, 10 before 9
        self.run_log(first=3)
        events = EventAccumulator(str(self.run_dir / "tensorboard/train")).Reload()
        self.assertEqual([e.step for e in events.Tensors("loss")], [1, 2, 3, 4, 5, 6])

    def test_a_full_disk_ends_no_run(self):
        """/dev/full takes nothing; what can be written again later is."""
        log = log_module.MetricsLog(self.run_dir, self.clock)

        def full(epoch, logs):
            if epoch == 0:
                self.before = self.path.read_text()
                self.path.unlink()
                self.path.symlink_to("/dev/full")
                log._writers["train"].add_scalar = mock.Mock(side_effect=OSError(28, "No space left on device"))
            else:
                self.path.unlink()
                self.path.write_text(self.before + '{"event": "upd')

        callbacks = [log, keras.callbacks.LambdaCallback(on_epoch_end=full)]
        with self.assertLogs(level="ERROR") as logged:
            drive(callbacks, self.clock)
            log.note(6, "after")
        self.assertLen(logged.output, 2)
        self.assertIn("The metrics log could not be written", logged.output[0])
        self.assertIn("TensorBoard events could not be written", logged.output[1])
        events = log_module.read_metrics(self.path)
        self.assertEqual([(e["event"], e["update"]) for e in events[-2:]], [("eval", 3), ("note", 6)])

    def test_without_tensorboard(self):
        with mock.patch.dict(sys.modules, {"tensorboard.summary": None}), self.assertLogs("absl") as logged:
            self.run_log()
        self.assertLen(logged.output, 1)
        self.assertIn("tensorboard is not installed", logged.output[0])
        self.assertLen(self.read(), STEPS + 2)
        self.assertFalse((self.run_dir / "tensorboard").exists())


if __name__ == "__main__":
    tf.test.main()
