"""Clusters by name, their processes, and the static shapes that a TPU asks of the step."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path
from typing import ClassVar

import keras
import pytest
import tensorflow as tf
from absl.testing import parameterized

import models
from lars_keras import LARS
from lars_keras.training import Trainer
from lars_keras.training.cluster import cluster_of, has_peers, make_cluster
from lars_keras.training.current_engine import engine_class
from lars_keras.training.engine import EngineOptions
from lars_keras.training.tensorflow.cluster import TensorFlowCluster
from running import exit_codes
from tests import prepared, workers
from tests import step_cases as cases

IMAGE_SIZES = {"alexnet": 67, "alexnet_bn": 67, "resnet50": 64}


class ClusterTest(parameterized.TestCase, tf.test.TestCase):
    def test_one_device(self):
        for name in ("single", "auto"):
            cluster = make_cluster(name)
            self.assertIsInstance(cluster.strategy, tf.distribute.OneDeviceStrategy)
            self.assertEqual((cluster.replicas, cluster.hosts, cluster.is_chief), (1, 1, True))
            self.assertFalse(cluster.remote_input)
            self.assertEqual(cluster.description, "OneDeviceStrategy")

    def test_the_cluster_of_a_model_is_that_of_its_strategy(self):
        strategy = cases.strategy("mirrored2")
        with TensorFlowCluster(strategy).scope():
            model = cases.linear()
            model.compile("sgd", "mse")
        for cluster in (cluster_of(model), Trainer(model, batch_size=8).cluster):
            self.assertIs(cluster.strategy, strategy)
            self.assertEqual((cluster.replicas, cluster.hosts, cluster.is_chief), (2, 1, True))
            self.assertEqual(cluster.any_across_hosts(False, True), [False, True])
            self.assertTrue(cluster.same_on_all_hosts(3))

    def test_a_lost_worker_is_known_by_its_error(self):
        two = '{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": {"type": "worker", "index": 0}}'
        lost = tf.errors.UnavailableError(None, None, "Connection reset by peer")
        for value, error, expected in (
            (two, lost, True),
            ("", lost, False),
            (two, tf.errors.InvalidArgumentError(None, None, "UNAVAILABLE"), False),
            (two, ValueError("shape"), False),
        ):
            with unittest.mock.patch.dict(os.environ, {"TF_CONFIG": value}):
                self.assertEqual(TensorFlowCluster.is_host_lost(error), expected)

    def test_no_peers_wait_for_the_exit(self):
        self.assertFalse(has_peers())

    def test_an_unknown_name_is_refused(self):
        with self.assertRaisesRegex(ValueError, "`strategy` must be one of auto, single.*Received: strategy='one'"):
            make_cluster("one")

    def test_multi_worker_needs_its_environment(self):
        for value, message in (
            ("", "TF_CONFIG unset"),
            ("{}", "TF_CONFIG unset"),
            ("{", "not the JSON"),
            ("[1]", "JSON"),
        ):
            with (
                unittest.mock.patch.dict(os.environ, {"TF_CONFIG": value}),
                self.assertRaisesRegex(ValueError, message),
            ):
                make_cluster("multi_worker")

    def test_replicas_of_several_workers_are_refused(self):
        cluster = '{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": {"type": "worker", "index": 0}}'
        with (
            unittest.mock.patch.dict(os.environ, {"TF_CONFIG": cluster}),
            self.assertRaisesRegex(ValueError, "replicas=4"),
        ):
            make_cluster("auto", replicas=4)

    @parameterized.parameters("grpc://127.0.0.1:9", "local")
    def test_unreachable_tpu(self, address):
        with self.assertRaisesRegex(ValueError, f"no TPU: .*tpu={address}"):
            make_cluster("tpu", tpu=address)

    @parameterized.parameters(("mirrored2", 4), ("mirrored2", None))
    def test_one_reduction_an_update(self, strategy, microbatch_size):
        """Counted while it runs, whatever the number of micro-batches."""

        class Counting(tf.distribute.ReductionToOneDevice):
            calls = tf.Variable(0)

            def batch_reduce_implementation(self, *args):
                self.calls.assign_add(1)
                return super().batch_reduce_implementation(*args)

        counting = Counting()
        replicas = int(strategy.removeprefix("mirrored"))
        mirrored = tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)], cross_device_ops=counting)
        cases.trained(cases.batch_norm(), cases.OPTIMIZERS["lars"], mirrored, microbatch_size=microbatch_size)
        self.assertEqual(counting.calls.numpy(), cases.UPDATES)


class XlaTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters("alexnet_small", "alexnet_small_lrn", "alexnet_bn")
    def test_replica_gradient_has_static_shapes(self, name):
        """The compiler for TPUs refuses a dynamic shape; so does the first stage of XLA anywhere."""
        self.check(name, "mixed_bfloat16")

    @parameterized.product(name=models.names(), policy=("float32", "mixed_bfloat16", "mixed_float16"))
    @pytest.mark.slow
    def test_replica_gradient_of_every_model_and_precision(self, name, policy):
        self.check(name, policy)

    def check(self, name, policy):
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        keras.config.set_dtype_policy(policy)
        size = IMAGE_SIZES.get(name, 32)
        model = models.get(name, num_classes=8, input_shape=(size, size, 3), seed=0)
        model.compile(LARS(), keras.losses.CategoricalCrossentropy(from_logits=True))
        batch = tf.zeros([2, size, size, 3], tf.uint8), tf.zeros([2, 8])
        spec = tf.data.Dataset.from_tensors(batch).element_spec
        options = EngineOptions(microbatch_size=2, accumulation_steps=2, jit_compile=True)
        step = engine_class()(model, cluster_of(model), options, spec).step
        metrics = [tf.convert_to_tensor(v) for v in step.forward.metrics]
        arguments = (*step.state(), *batch, None, tf.constant(0), tf.constant(1.0), metrics)
        hlo = step.gradient.experimental_get_compiler_ir(*arguments)(stage="hlo")
        self.assertNotIn("<=", hlo)  # a bound, as in f32[<=2], marks a dynamic dimension
        self.assertIn({"float32": "f32", "mixed_bfloat16": "bf16", "mixed_float16": "f16"}[policy] + "[", hlo)


class WorkersTest(tf.test.TestCase):
    """`train.py` in two real processes on loopback."""

    environment: ClassVar = {}

    def setUp(self):
        super().setUp()
        self.dir = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.command = [
            sys.executable,
            "train.py",
            "--flagfile=flags/recipes/demo.flags",
            f"--data_dir={prepared.digits()}",
            "--batch_size=512",
            "--microbatch_size=64",
            "--warmup=0",
            "--learning_rate=0.2",  # at the demo's rate of 15 the first updates multiply the last bit by a thousand
            "--jit_compile=auto",  # JAX compiles, TensorFlow on a CPU does not
        ]

    def start(self, command):
        return workers.start(2, command, **self.environment)

    @pytest.mark.slow  # tests/training/test_step.py has the numbers of two workers
    def test_equals_two_mirrored_replicas(self):
        two = self.start([*self.command, "--steps=4", "--strategy=multi_worker", f"--run_dir={self.dir}/two"])
        for process, output in zip(two, workers.wait(two), strict=True):
            self.assertEqual(process.returncode, 0, output)
        mirrored = [*self.command, "--steps=4", "--strategy=mirrored", "--replicas=2", f"--run_dir={self.dir}/mirrored"]
        subprocess.run(mirrored, cwd=workers.ROOT, check=True, capture_output=True, env=os.environ | self.environment)
        results = [json.loads((self.dir / name / "results.json").read_text()) for name in ("two", "mirrored")]
        self.assertEqual(*(r["n"] for r in results))
        self.assertEqual(*(r["updates"] for r in results))
        for key in ("loss", "top1", "top5"):
            self.assertAllClose(*(r[key] for r in results), rtol=1e-5)

    @pytest.mark.slow
    def test_a_signal_to_one_worker_saves_and_stops_both(self):
        command = [*self.command, "--strategy=multi_worker", f"--run_dir={self.dir}/run"]
        two = self.start([*command, "--steps=40"])
        try:
            self.wait_for_an_update(two[0], self.dir / "run")
            two[1].send_signal(signal.SIGTERM)
            outputs = [p.communicate(timeout=120)[0] for p in two]
        finally:
            for process in two:
                process.kill()
                process.communicate()
        for process, output in zip(two, outputs, strict=True):
            self.assertEqual(process.returncode, exit_codes.PREEMPTED, output)
            self.assertIn("saved; start it again", output)
        again = self.start(command)
        outputs = workers.wait(again)
        self.assertEqual([p.returncode for p in again], [0, 0], outputs)
        self.assertRegex(outputs[0], "went on after update [1-9]")

    def wait_for_an_update(self, process, run_dir):
        deadline = time.monotonic() + 240
        while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
            self.assertLess(time.monotonic(), deadline, "no update was logged")
            if process.poll() is not None:
                self.fail(process.communicate()[0])
            time.sleep(0.5)

    def test_a_killed_worker_stops_the_other(self):
        run_dir = self.dir / "run"
        two = self.start([*self.command, "--epochs=1000", "--strategy=multi_worker", f"--run_dir={run_dir}"])
        try:
            self.wait_for_an_update(two[0], run_dir)
            two[1].send_signal(signal.SIGKILL)
            output = two[0].communicate(timeout=120)[0]
        finally:
            for process in two:
                process.kill()
                process.communicate()
        self.assertEqual(two[0].returncode, exit_codes.HOST_LOST, output)
        self.assertIn("another host is gone", output)
        self.assertNotIn("Traceback", output)


@pytest.mark.slow
class JaxWorkersTest(WorkersTest):
    """The same on JAX."""

    environment: ClassVar = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}


if __name__ == "__main__":
    tf.test.main()
