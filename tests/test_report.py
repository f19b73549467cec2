"""What a run leaves for its reader: the metrics log, the progress lines and the report."""

import html.parser
import io
import json
import math
import pathlib
import sys
import tempfile
from unittest import mock

import keras
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training import progress, report

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
    """Calls what a trainer calls: one update a call, an evaluation after each epoch."""
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
        speed = progress.Throughput(batch_size=100, first_update=10, clock=clock)
        clock.now += 60
        speed.lap(11)  # compiled
        self.assertTrue(math.isnan(speed.images_per_second))
        clock.now += 2
        speed.lap(12)
        clock.now += 500
        speed.restart()
        clock.now += 8
        speed.lap(16)  # one call of four updates
        self.assertEqual(speed.images_per_second, 500 / 10)
        self.assertTrue(math.isnan(speed.data_wait))  # nobody told

    def test_share_of_waiting_for_data(self):
        clock = FakeClock()
        speed = progress.Throughput(batch_size=100, clock=clock)
        for seconds, finished, waited in ((60, 1, 50.0), (2, 2, 1.0), (6, 3, 1.0)):
            clock.now += seconds
            speed.lap(finished, waited)
        self.assertEqual(speed.data_wait, 2 / 8)

    def test_time_left_counts_evaluations_but_not_compilation(self):
        clock = FakeClock()
        speed = progress.Throughput(batch_size=100, clock=clock)
        self.assertTrue(math.isnan(speed.seconds_left(9)))
        for seconds, finished in ((60, 1), (2, 2), (2, 3)):
            clock.now += seconds
            speed.lap(finished)
        clock.now += 4
        speed.restart()
        self.assertEqual(speed.seconds_left(9), 6 * (2 + 2 + 4) / 2)


class ProgressTest(tf.test.TestCase):
    def lines(self, **kwargs) -> list[str]:
        clock, file = FakeClock(), io.StringIO()
        drive([progress.Progress(file, clock=clock)], clock, **kwargs)
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
        bar = progress.Progress(file, clock=clock)
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
        drive([progress.MetricsLog(self.run_dir, self.clock)], self.clock, **kwargs)

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

    def test_resume_at_an_epochs_end_keeps_one_evaluation(self):
        self.run_log(stop=3)
        log = progress.MetricsLog(self.run_dir, self.clock)
        log.set_params({"batch_size": BATCH, "first_update": 3, "steps_per_epoch": PER_EPOCH})
        log.on_train_begin()
        log.on_epoch_end(0, {"val_loss": 0.25, "val_top1": 0.5, "val_top5": 0.5, "val_n": 450.0})
        log.on_train_end()
        self.assertEqual([e["event"] for e in self.read()], ["update"] * 3 + ["eval"])

    def test_new_run_starts_an_empty_log(self):
        self.run_log()
        self.run_log(stop=1)
        self.assertEqual([e["update"] for e in self.read()], [1])

    def test_not_finite_is_null(self):
        log = progress.MetricsLog(self.run_dir, self.clock)
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
            (path,) = (self.run_dir / "tensorboard" / run).iterdir()
            for record in tf.data.TFRecordDataset(str(path)):
                event = tf.compat.v1.Event.FromString(record.numpy())
                for value in event.summary.value:
                    number = float(tf.make_ndarray(value.tensor))
                    found.setdefault((run, value.tag), []).append((event.step, number))
        self.assertAllClose(found["train", "learning_rate"], [(u + 1, 0.5 * u) for u in range(6)])
        self.assertAllClose(found["validation", "top1"], [(3, 0.9725), (6, 0.9725)])
        self.assertLen(found["train", "images_per_second"], 5)

    def test_without_tensorboard(self):
        with mock.patch.dict(sys.modules, {"tensorboard.summary": None}), self.assertLogs("absl") as logged:
            self.run_log()
        self.assertLen(logged.output, 1)
        self.assertIn("tensorboard is not installed", logged.output[0])
        self.assertLen(self.read(), STEPS + 2)
        self.assertFalse((self.run_dir / "tensorboard").exists())


class PageParser(html.parser.HTMLParser):
    """Collects the page's elements and text; fails where a tag is not closed in order."""

    VOID = {"meta", "link", "br", "img", "hr", "input"}

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.starts: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        if self.open:
            raise AssertionError(f"not closed: {self.open}")

    def handle_starttag(self, tag, attrs):
        self.starts.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.starts.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes nothing, line {self.getpos()[0]}")

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


class ReportTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.run_dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        config = {
            "model": "alexnet_small",
            "dataset": "digits",
            "optimizer": "lars",
            "batch_size": 8192,
            "exclude": ["<b>bias</b>"],
            "warnings": ["The rate is 100 times off & so on."],
            "layer_plan": [
                {"path": "conv1/kernel", "shape": [3, 3, 1, 32], "adapt": True, "decay": False, "lr_scale": 0.5}
            ],
        }
        self.write("config.json", json.dumps(config))

    def write(self, name: str, text: str) -> None:
        (self.run_dir / name).write_text(text)

    def write_run(self) -> None:
        """A finished run, with metrics as `MetricsLog` leaves them."""
        clock = FakeClock()
        drive([progress.MetricsLog(self.run_dir, clock)], clock)
        self.write("flags.txt", "--run_dir=<script>alert(1)</script>\n--seed=7\n")
        self.write("plan.txt", "batch 8192 = 16 micro-batches of 512\n")
        results = {
            "top1": 0.9876,
            "top5": 0.9991,
            "loss": 0.0432,
            "n": 450,
            "updates": 1234,
            "seconds": 3725.0,
            "images_per_second": 5203.4,
            "versions": {"keras": "3.15.1"},
        }
        self.write("results.json", json.dumps(results))

    def page(self) -> PageParser:
        path = report.write_report(self.run_dir)
        self.assertEqual(path, self.run_dir / "report.html")
        return PageParser(path.read_text())

    def test_finished_run(self):
        self.write_run()
        page = self.page()
        start = page.texts.index("Top-1")
        tiles = dict(zip(page.texts[start : start + 12 : 2], page.texts[start + 1 : start + 12 : 2], strict=True))
        self.assertEqual(tiles["Top-1"], "98.76 %")
        self.assertEqual(tiles["Top-5"], "99.91 %")
        self.assertEqual(tiles["Loss"], "0.0432")
        self.assertEqual(tiles["Updates"], "1,234")
        self.assertEqual(tiles["Training time"], "1 h 02 min")
        self.assertEqual(tiles["Images/s"], "5,203")
        for text in (
            "alexnet_small on digits: lars, batch 8192",
            "Finished.",
            "Top-1, top-5 and loss: held-out images, 450 scored, each exactly once.",
            "The rate is 100 times off & so on.",
            "batch 8192 = 16 micro-batches of 512",
            '["<b>bias</b>"]',
            "3×3×1×32",
            "288",
            "3.15.1",
            "97.25 %",
        ):
            self.assertIn(text, page.texts)

    def test_charts(self):
        self.write_run()
        page = self.page()
        charts = [attrs for tag, attrs in page.starts if tag == "svg"]
        self.assertLen(charts, 4)
        self.assertEqual(
            charts[1]["aria-label"],
            "Top-1 over optimizer updates. Last values: training, since the epoch began 50.00 %; validation 97.25 %.",
        )
        ids = [attrs["id"] for _, attrs in page.starts if "id" in attrs]
        self.assertLen(set(ids), len(ids))
        used = [attrs["xlink:href"][1:] for tag, attrs in page.starts if tag == "use"]
        self.assertNotEmpty(used)
        self.assertContainsSubset(used, ids)

    def test_escapes_and_stands_alone(self):
        self.write_run()
        page = self.page()
        text = (self.run_dir / "report.html").read_text()
        self.assertNotIn("<script", text)
        self.assertNotIn("<b>", text)
        self.assertIn("--run_dir=<script>alert(1)</script>\n--seed=7", page.texts)
        for tag, attrs in page.starts:
            self.assertNotIn(tag, ("script", "link", "img", "iframe"))
            for name in ("src", "href", "xlink:href"):
                self.assertStartsWith(attrs.get(name, "#"), "#")

    def test_same_bytes_each_time(self):
        self.write_run()
        first = report.write_report(self.run_dir).read_bytes()
        self.assertEqual(report.write_report(self.run_dir).read_bytes(), first)

    def test_unfinished_run(self):
        self.write_run()
        (self.run_dir / "results.json").unlink()
        page = self.page()
        self.assertIn(
            "Unfinished: there is no results.json, and the last logged update is 6. The figures are those so far.",
            page.texts,
        )
        self.assertIn(
            "Top-1, top-5 and loss: held-out images after update 6, 450 scored, each exactly once.",
            page.texts,
        )

    @parameterized.parameters(0, 1)
    def test_says_what_is_missing(self, updates):
        clock = FakeClock()
        drive([progress.MetricsLog(self.run_dir, clock)], clock, stop=updates)
        page = self.page()
        self.assertIn("No evaluation is logged yet.", page.texts)
        self.assertIn("The run folder has no flags.txt.", page.texts)
        missing = "Nothing to draw yet for: validation."
        self.assertEqual(page.texts.count(missing), 3 if updates else 0)
        self.assertLen([tag for tag, _ in page.starts if tag == "svg"], 4 if updates else 0)

    def test_diverged_run(self):
        lines = [
            {
                "event": "update",
                "update": u,
                "epoch": u / 3,
                "loss": loss,
                "step_loss": loss,
                "top1": 0.1,
                "top5": 0.5,
                "learning_rate": 1.0,
                "images_per_second": None,
                "seconds": u,
            }
            for u, loss in enumerate((2.3, 90.0, None, None), start=1)
        ]
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        self.assertIn("The loss was not finite at update 3.", self.page().texts)

    def test_long_run_keeps_the_page_small(self):
        line = {"event": "update", "top1": 0.1, "top5": 0.5, "images_per_second": None, "epoch": 1.0}
        with (self.run_dir / "metrics.jsonl").open("w") as file:
            for u in range(1, 5001):
                loss = 2.0 + (u * 7919 % 101) / 101  # noise
                more = {"update": u, "loss": loss, "step_loss": loss, "learning_rate": u, "seconds": u}
                file.write(json.dumps({**line, **more}) + "\n")
        texts = self.page().texts
        self.assertIn("training, mean of 100 updates", texts)
        self.assertLess((self.run_dir / "report.html").stat().st_size, 300_000)

    def test_command(self):
        self.assertEqual(report.main([str(self.run_dir)]), 0)
        self.assertEqual(report.main([]), 2)
        self.assertEqual(report.main([str(self.run_dir / "absent")]), 2)
        self.write("config.json", "{")
        self.assertEqual(report.main([str(self.run_dir)]), 2)

    def test_no_run_folder(self):
        empty = self.enterContext(tempfile.TemporaryDirectory())
        with self.assertRaisesRegex(FileNotFoundError, "`run_dir` must be a run folder.*Received"):
            report.write_report(empty)


if __name__ == "__main__":
    tf.test.main()
