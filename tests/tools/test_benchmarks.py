"""The benchmarks measure what they say; their speed is not tested."""

import json
import math
import pathlib
import tempfile
from unittest import mock

import keras
import numpy as np
import pytest
from absl.testing import absltest

import models
from flags.config import RunConfig
from lars_keras import data as datasets
from lars_keras.data.arrays import ArrayData
from lars_keras.data.augment import pad_crop_flip
from tools.benchmarks import cifar10_arrays, growth, host_time, noise_scale, noise_scale_cost, optimizer_step


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


class NoiseScaleTest(absltest.TestCase):
    def test_a_finished_run_joins_the_file_and_is_drawn(self):
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        run = {"batch_size": 4096, "microbatch_size": 512, "learning_rate": 40.0}
        lines = [
            {"event": "update", "update": 12},
            {"event": "noise_scale", "update": 6, "epoch": 1.0, "noise_scale": 812.4, "low": 700.0, "high": None},
            {"event": "noise_scale", "update": 12, "epoch": 2.0, "noise_scale": None, "low": None, "high": None},
        ]
        (folder / "config.json").write_text(json.dumps(run))
        (folder / "results.json").write_text('{"top1": 0.93999}')
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        part = {"epoch": 1, "noise_scale": 9, "low": 8, "high": 9}
        held = {"comparison": "digits", "batch_size": 64, "parts": [part]}
        out, plot = folder / "out.json", folder / "plot.svg"
        out.write_text(json.dumps({"runs": [held]}))
        arguments = f"--run_dir={folder} --recipe=cifar10_fast_4k --out={out} --plot={plot}".split()
        with mock.patch("sys.argv", ["noise_scale", *arguments]):
            noise_scale.main()
        first, second = json.loads(out.read_text())["runs"]
        self.assertEqual(first, held)
        self.assertEqual((second["comparison"], second["batch_size"], second["top1"]), ("cifar10_fast_4k", 4096, 0.94))
        self.assertEqual(second["parts"][0], {"epoch": 1.0, "noise_scale": 812, "low": 700, "high": None})
        self.assertLen(second["parts"], 2)
        self.assertIn("fast network", plot.read_text())

    def test_cost_is_the_median_of_paired_rounds(self):
        durations = iter([9, 9, 2.0, 2.2, 4.0, 2.0, 3.0, 3.3])
        clock = mock.Mock(now=0.0)
        clock.perf_counter = lambda: clock.now

        def fit(*args, **kwargs):
            clock.now += next(durations)

        replaced = {"time": clock, "make_trainer": lambda step, noise_scale: mock.Mock(fit=fit)}
        with mock.patch.multiple(noise_scale_cost, **replaced):
            row = noise_scale_cost.measure(noise_scale_cost.STEPS[1], rounds=3)
        # Round 0 does not count. The step without comes first in odd rounds.
        self.assertEqual(row["seconds_per_update"], {"without": [2.0, 2.0, 3.0], "with": [2.2, 4.0, 3.3]})
        self.assertEqual(row["ratio"], 1.1)

    def test_one_of_the_two_steps_measures(self):
        step, trainers, make = noise_scale_cost.Step("lenet1989", 10, 4, "float32"), [], noise_scale_cost.make_trainer
        with mock.patch.object(
            noise_scale_cost, "make_trainer", lambda *args: trainers.append(make(*args)) or trainers[-1]
        ):
            self.assertGreater(noise_scale_cost.measure(step, rounds=1)["ratio"], 0)
        self.assertEqual([(t.batch_size, t.accumulation_steps) for t in trainers], [(8, 2)] * 2)
        self.assertEqual(["ghost_gradient" in t.measures for t in trainers], [False, True])


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


class GrowthTest(absltest.TestCase):
    def test_slope(self):
        rows = [{"size": 10**i, "ms": 3 * 10 ** (1.5 * i)} for i in range(3)]
        self.assertAlmostEqual(growth.slope(rows), 1.5)

    def test_a_part_is_measured_and_drawn(self):
        self.measure_and_draw({"variables": (2, 4)})

    @pytest.mark.slow
    def test_the_other_parts(self):
        sizes = {"parameters": (10**5, 10**6), "host": (2, 4), "micro-batches": (1, 2)}
        self.assertEqual({"variables", *sizes}, growth.PARTS.keys())
        self.measure_and_draw(sizes)

    def measure_and_draw(self, sizes):
        path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "growth.svg"
        results = {part: growth.measure(part, sizes[part], rounds=1) for part in sizes}
        growth.plot(results, path)
        for result in results.values():
            self.assertTrue(all(row["ms"] > 0 for row in result["rows"]))
            self.assertIn(result["axis"].split()[0], path.read_text())


class Cifar10ArraysTest(absltest.TestCase):
    def test_same_batches_from_packed_images(self):
        rng = np.random.default_rng(0)
        splits = [(rng.integers(0, 256, (n, 8, 8, 3), "uint8"), rng.integers(0, 10, n)) for n in (30, 20)]
        data = ArrayData("cifar10", *splits, 10, crop_flip=pad_crop_flip, augment="crop_flip")
        path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "images.npz"
        with mock.patch.object(datasets, "load", return_value=data) as load:
            cifar10_arrays.pack("FOLDER", path)
        load.assert_called_once_with("cifar10", data_dir="FOLDER")
        packed = cifar10_arrays.load(path, RunConfig(dataset="cifar10", augment="crop_flip"))
        for mine, theirs in (
            (packed.train_numpy(12, count=4, seed=3), data.train_numpy(12, count=4, seed=3)),
            (packed.test_numpy(12), data.test_numpy(12)),
        ):
            for batch, expected in zip(mine, theirs, strict=True):
                for part, value in zip(batch, expected, strict=True):
                    np.testing.assert_array_equal(part, value)
        held_out = cifar10_arrays.load(path, RunConfig(dataset="cifar10", validation_split=0.2))
        self.assertEqual((held_out.num_train, held_out.num_test), (24, 6))


class TrainingStepTest(absltest.TestCase):
    def test_networks_of_pytorch_are_ours(self):
        """Compare the numbers of weights, variable by variable."""
        pytest.importorskip("torch", reason="compares with PyTorch, which make test-torch installs")
        from tools.benchmarks.torch_networks import NETWORKS

        for name, make in NETWORKS.items():
            ours = models.get(name, num_classes=10)
            counts = [math.prod(v.shape) for v in ours.trainable_variables]
            theirs = [p.numel() for p in make(10).parameters() if p.requires_grad]
            self.assertEqual(sorted(counts), sorted(theirs), name)


if __name__ == "__main__":
    absltest.main()
