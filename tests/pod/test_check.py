"""The pod check of a user's own model: arguments, refusals, the answer for a real chip."""

import ast
import contextlib
import functools
import importlib.util
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import types
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from lars_keras import pod
from lars_keras.pod import __main__ as command
from lars_keras.pod import driver, worker
from lars_keras.pod.batch import ArraySpec, parse_batch
from lars_keras.pod.chips import CHIPS
from lars_keras.pod.measure import Collective
from lars_keras.pod.report import make_report
from tests.pod import own_model

BATCH = ("uint8:16,16,3", "int32")
HERE = "tests.pod.own_model"


def needs_compiler(test):
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax") is None:
        test.skipTest("libtpu, the TPU compiler, is not installed: the extra `pod` has it")


def answer(**changes):
    """Return the answer of a worker for a batch of 512 on two chips with two micro-batches of 128."""
    program = {
        "name": "accumulate",
        "times": 2,
        "arguments": 2 * 2**30,
        "outputs": 2**30,
        "aliased": 2**30,
        "temporaries": 6 * 2**30,
        "code": 0,
        "flops": 197e9,
        "hbm_bytes": 819e6,
        "bytes_accessed": 1e9,
        "collectives": [{"kind": "all-reduce", "size": 2**20, "group": 2, "dtypes": ["f32"]}],
        "resident": 0,
    }
    found = {
        "model": "own",
        "parameters": 1000,
        "compute_dtype": "bfloat16",
        "backend": "jax",
        "topology": "v5e:1x2",
        "device_kind": "TPU v5 lite",
        "chips": 2,
        "devices": 2,
        "microbatch_size": 128,
        "accumulation_steps": 2,
        "reason": None,
        "programs": [program],
        "smaller": {"microbatch_size": 64, "memory": 6 * 2**30},
        "fitting_microbatch_size": None,
        "reduced_bytes": 4000,
        "notes": [],
        "compile_seconds": 1.0,
        "versions": {"python": "3"},
    }
    return found | changes


class BatchTest(parameterized.TestCase, tf.test.TestCase):
    def test_texts_arrays_and_specs_are_the_same(self):
        expected = (ArraySpec((16, 16, 3), "uint8"), ArraySpec((), "int32"))
        for batch in (
            BATCH,
            list(BATCH),
            (np.zeros((2, 16, 16, 3), "uint8"), np.zeros(2, "int32")),
            (keras.KerasTensor((None, 16, 16, 3), "uint8"), keras.KerasTensor((None,), "int32")),
            (tf.TensorSpec((None, 16, 16, 3), tf.uint8), tf.TensorSpec((None,), tf.int32)),
            expected,
        ):
            self.assertEqual(parse_batch(batch), expected)

    def test_nested_inputs_and_weights(self):
        found = parse_batch(({"a": "float32:2", "b": "int32"}, "int32", "float32"))
        self.assertEqual(found[0], {"a": ArraySpec((2,), "float32"), "b": ArraySpec((), "int32")})
        self.assertLen(found, 3)

    @parameterized.parameters(
        ("uint8:16,16,3", "must be \\(x, y\\)"),
        ((BATCH[0],), "must be \\(x, y\\)"),
        (("uint8:16,x,3", "int32"), "such as uint8:224,224,3 or int32. Received: 'uint8:16,x,3'"),
        (("uint8:0,16,3", "int32"), "Received: 'uint8:0,16,3'"),
        (("pixels:16,16,3", "int32"), "Received: 'pixels:16,16,3'"),
        ((3, "int32"), "have `shape` and `dtype`. Received: 3"),
        ((keras.KerasTensor((None, None, 16, 3)), "int32"), "known size in every other. Received: shape="),
        ((np.float32(1), "int32"), "must have a batch dimension"),
    )
    def test_refusals(self, batch, message):
        with self.assertRaisesRegex(ValueError, message):
            parse_batch(batch)


class RefusalTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ({"topology": "v9:2x2"}, "v5e.*Received: topology=v9:2x2"),
        ({"backend": "torch"}, "`backend` must be one of jax, tensorflow. Received: backend='torch'"),
        ({"backend": "tensorflow", "reduce_dtype": "bfloat16"}, "for JAX. Received: backend='tensorflow'"),
        ({"backend": "tensorflow", "shard_optimizer_state": True}, "for JAX. .*shard_optimizer_state=True"),
        ({"make_model": 3}, "must be a function that returns a compiled Keras model. Received: int"),
        ({"batch_spec": ("int32",)}, "`batch_spec` must be"),
    )
    def test_arguments(self, changes, message):
        arguments = {"make_model": own_model.make_model, "batch_spec": BATCH, "topology": "v5e:2x2", "batch_size": 64}
        with self.assertRaisesRegex(ValueError, message), mock.patch.object(importlib.util, "find_spec"):
            pod.check(**(arguments | changes))

    def test_names_go_to_the_other_process_as_names(self):
        with (
            mock.patch.object(importlib.util, "find_spec"),
            mock.patch.object(driver, "_in_own_process", return_value=answer()) as asked,
        ):
            pod.check("mine:make_model", "mine:batch_spec", topology="v5e:1x2", batch_size=512, backend="tensorflow")
        pickled, backend = asked.call_args.args
        request = pickle.loads(pickled)
        self.assertEqual(backend, "tensorflow")
        self.assertEqual(request.make_model, driver.Reference("mine:make_model", "make_model"))
        self.assertEqual(request.batch_spec, driver.Reference("mine:batch_spec", "batch_spec"))

    def test_without_the_compiler(self):
        with (
            mock.patch.object(importlib.util, "find_spec", lambda name: None),
            self.assertRaisesRegex(RuntimeError, r"install this project with its extra \[pod\]"),
        ):
            pod.check(own_model.make_model, BATCH, topology="v5e:2x2", batch_size=64)

    @parameterized.parameters(
        ("tests.pod.nowhere:make_model", "there is no module tests.pod.nowhere on sys.path"),
        (f"{HERE}:nothing", "tests.pod.own_model has no function nothing. Received: make_model=tests.pod.own_model:no"),
        (f"{HERE}:SIZE", "SIZE is a int, not a function"),
        (HERE, "must be package.module:function. Received: make_model=tests.pod.own_model"),
    )
    def test_names_of_functions(self, name, message):
        with self.assertRaisesRegex(ValueError, message):
            driver.Reference(name, "make_model").resolve()

    @parameterized.parameters(
        (own_model.not_compiled, ValueError, "call `model.compile.optimizer, loss.` before .*not compiled"),
        (own_model.no_model, ValueError, "must return a compiled Keras model. Received: a str"),
        (own_model.failing, RuntimeError, "`make_model` failed, with KERAS_BACKEND=tensorflow: KeyError: 'no such l"),
        (driver.Reference(f"{HERE}:nothing", "make_model"), ValueError, "has no function nothing"),
    )
    def test_models(self, make_model, error, message):
        with self.assertRaisesRegex(error, message):
            worker.checked_model(make_model)

    def test_only_what_another_process_can_import_goes_there(self):
        def pickled(make_model):
            return driver._pickled(
                driver.Request(make_model, BATCH, "v5e:2x2", 64, None, False, "float32", False, True)
            )

        for make_model in (
            own_model.make_model,
            functools.partial(own_model.make_model, width=64),
            driver.Reference(f"{HERE}:make_model", "make_model"),
        ):
            self.assertEqual(pickle.loads(pickled(make_model)).topology, "v5e:2x2")
        of_main = type(own_model.make_model)(own_model.make_model.__code__, {"__name__": "__main__"}, "make_model")
        of_main.__module__ = "__main__"
        for make_model in (lambda: None, self.needs_a_name, of_main):
            self.assertIsNone(pickled(make_model))

    def needs_a_name(self):
        return None

    def test_a_lambda_needs_jax_in_this_process(self):
        """The tests run on TensorFlow."""
        for backend in ("jax", "tensorflow"):
            with (
                mock.patch.object(importlib.util, "find_spec"),
                self.assertRaisesRegex(ValueError, f"KERAS_BACKEND={backend}, which must import `make_model`"),
            ):
                pod.check(lambda: None, BATCH, topology="v5e:2x2", batch_size=64, backend=backend)

    def test_a_lambda_runs_in_this_process_where_that_has_the_backend(self):
        """With the policy and the distribution of the caller put back."""
        policy = keras.config.dtype_policy()

        def here(request):
            self.assertIsNone(keras.distribution.distribution())
            keras.config.set_dtype_policy("mixed_bfloat16")
            return answer()

        with (
            mock.patch.object(keras.backend, "backend", lambda: "jax"),
            mock.patch.object(importlib.util, "find_spec"),
            mock.patch.object(worker, "answer", here),
        ):
            report = pod.check(lambda: None, BATCH, topology="v5e:1x2", batch_size=512)
        self.assertEqual(report.batch_size, 512)
        self.assertEqual(keras.config.dtype_policy().name, policy.name)


class ReportTest(tf.test.TestCase):
    def test_fits(self):
        report = make_report(answer(), CHIPS["v5e"], 512)
        self.assertTrue(report.fits)
        # 2 GiB and 1/32 GiB an example: 256 examples take 10 GiB.
        self.assertEqual((report.memory, report.largest_microbatch_size), (8 * 2**30, 256))
        self.assertFalse(report.largest_is_compiled)
        self.assertAllClose(report.bounds.seconds_per_update, 2e-3)
        self.assertAllClose(report.images_per_second, 256e3)
        self.assertEqual(report.collectives, [Collective("all-reduce", 2**20, 2, ["f32"])] * 2)
        for line in (
            "512 = 2 TPU v5 lite devices x 2 micro-batches x 128 examples",
            "accumulate x 2 arguments 2,048 MiB, temporaries 6,144 MiB",
            "8,192 of 16,384 MiB per device",
            "all-reduce of 1.0 MiB f32 over 2 devices",
            "2.00 ms per update, 256,000 images/s, 100% of peak compute",
            "a micro-batch of about 256 fits",
            "verdict      fits",
        ):
            self.assertIn(line, str(report))
        self.assertEqual(json.loads(json.dumps(report.to_dict()))["bounds"]["bound"], "compute")

    def test_memory_beyond_the_chip(self):
        found = answer()
        found["programs"][0]["resident"] = 9 * 2**30
        report = make_report(found | {"smaller": None}, CHIPS["v5e"], 512)
        self.assertFalse(report.fits)
        self.assertIn("17,408 of 16,384 MiB", str(report))
        self.assertIn("verdict      does not fit", str(report))

    def test_refused_by_the_compiler(self):
        reason = "RESOURCE_EXHAUSTED: Used 20.0G of 15.75G hbm."
        changes = {"programs": [], "smaller": None, "reason": reason, "fitting_microbatch_size": 32}
        report = make_report(answer(**changes), CHIPS["v5e"], 512)
        self.assertFalse(report.fits)
        self.assertIsNone(report.images_per_second)
        self.assertIn(reason, str(report))
        self.assertIn("a micro-batch of 32 fits, it was compiled", str(report))
        self.assertIn("verdict      does not fit", str(report))

    def test_the_search_below_a_size_that_does_not_fit(self):
        tried = []

        def compiled(size, steps):
            """Take 2 bytes per example, and find no room from 80 on. The update holds 40 bytes in any case."""
            tried.append((size, steps))
            if size > 80:
                raise worker.DoesNotFit
            return [types.SimpleNamespace(memory=2 * size), types.SimpleNamespace(memory=40)]

        self.assertEqual(worker._largest_that_fits(compiled, 192, 2, capacity=50), 24)
        self.assertEqual(tried, [(96, 4), (48, 8), (24, 16)])
        self.assertIsNone(worker._largest_that_fits(compiled, 192, 2, capacity=39))
        self.assertEqual(worker._largest_that_fits(compiled, 2**15, 1, capacity=40), 16)

    def test_the_all_reduce_of_tensorflow(self):
        report = make_report(answer(backend="tensorflow"), CHIPS["v5e"], 512)
        self.assertEqual(report.programs[-1].collectives[-1], Collective("all-reduce", 4000, 2, ["float32"]))
        self.assertIn("computed, not read", str(report))


class CommandTest(parameterized.TestCase, tf.test.TestCase):
    def run_command(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command.main(list(arguments))
        return code, out.getvalue(), err.getvalue()

    @parameterized.parameters(
        (("--topology=v9:2x2",), "v5e.*Received: topology=v9:2x2"),
        (("--topology=v5e:2x2", f"--batch_spec={HERE}:batch_spec"), "either by `x` and `y`, or by `batch_spec`"),
        (("--topology=v5e:2x2", "--backend=tensorflow", "--shard_optimizer_state"), "for JAX. Received: backend='tens"),
    )
    def test_one_clear_line(self, arguments, message):
        code, _, err = self.run_command(f"{HERE}:make_model", "--batch_size=64", "--x=uint8:3", "--y=int32", *arguments)
        self.assertEqual(code, 2)
        self.assertRegex(err, message)
        self.assertLen(err.splitlines(), 1)

    def test_exit_codes_and_file(self):
        fits = make_report(answer(), CHIPS["v5e"], 512)
        refused = make_report(answer(programs=[], smaller=None, reason="no room"), CHIPS["v5e"], 512)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "check.json"
            options = ("m:f", "--x=uint8:3", "--y=int32", "--batch_size=512", "--topology=v5e:1x2", f"--out={path}")
            with mock.patch.object(command, "check", side_effect=[fits, refused]):
                self.assertEqual(self.run_command(*options)[0], 0)
                self.assertTrue(json.loads(path.read_text())["jax"]["fits"])
                self.assertEqual(self.run_command(*options)[0], 1)
            with mock.patch.object(command, "check", side_effect=[fits, fits]):
                code, out, _ = self.run_command(*options, "--backend=both")
            with mock.patch.object(command, "check", return_value=fits):  # a folder is in the place of the file
                refused, printed, err = self.run_command(*options[:-1], f"--out={folder}")
        self.assertEqual((code, refused), (0, 2))
        self.assertIn("819 GB/s", printed)
        self.assertRegex(err, "The figures cannot be written to .*Is a directory")
        self.assertIn("Where the backends differ", out)
        self.assertIn("819 GB/s", out)


class OwnModelTest(tf.test.TestCase):
    """A model of the user's, compiled for a chip."""

    def setUp(self):
        super().setUp()
        needs_compiler(self)

    def test_unknown_shape(self):
        with self.assertRaisesRegex(
            ValueError, "`topology` is not known to this TPU compiler: .+Received: topology=v5e:3x3"
        ):
            worker.devices_of("v5e:3x3")
        self.assertLen(worker.devices_of("v4:2x2x1"), 4)  # one of JAX's devices per chip

    def test_on_jax(self):
        make_model = functools.partial(own_model.make_model, width=64)
        report = pod.check(make_model, BATCH, topology="v5e:2x2", batch_size=256, microbatch_size=16, search=False)
        weights = 3 * 9 * 64 + 64 + 2 * 64 + 14 * 14 * 64 * 10 + 10
        self.assertEqual((report.model, report.parameters, report.compute_dtype), ("own", weights, "bfloat16"))
        self.assertEqual((report.devices, report.microbatch_size, report.accumulation_steps), (4, 16, 4))
        self.assertEqual([p.name for p in report.programs], ["begin", "accumulate", "finish"])
        begin, accumulate, finish = report.programs
        self.assertEqual((begin.times, accumulate.times, finish.times), (1, 4, 1))
        self.assertEqual(accumulate.collectives, [])
        # Gradients, moving statistics and the loss, in float32.
        reduced = sum(c.size for c in finish.collectives if c.kind == "all-reduce" and c.group == 4)
        self.assertBetween(reduced, 4 * weights, 4 * weights * 1.1)
        # Forward and backward: 2 products for the first layer, whose input needs no gradient, 3 for the last.
        flops = 2 * 16 * (2 * 14 * 14 * 27 * 64 + 3 * 14 * 14 * 64 * 10)
        self.assertBetween(accumulate.flops, flops, 1.5 * flops)
        self.assertTrue(report.fits)
        self.assertIsNone(report.largest_microbatch_size)
        self.assertEqual(report.notes, [])

    @pytest.mark.slow
    def test_on_tensorflow(self):
        report = pod.check(
            f"{HERE}:make_model",
            f"{HERE}:batch_spec",
            topology="v5e:2x2",
            batch_size=256,
            microbatch_size=16,
            backend="tensorflow",
            search=False,
        )
        self.assertEqual([(p.name, p.times) for p in report.programs], [("accumulate", 4), ("finish", 1)])
        self.assertGreater(report.programs[-1].collectives[-1].size, 4 * report.parameters)
        self.assertTrue(report.fits)

    @pytest.mark.slow
    def test_does_not_fit(self):
        """12.5 KiB of activations per example, and a million examples on a chip."""
        report = pod.check(own_model.make_model, BATCH, topology="v5e:2x2", batch_size=2**23)
        self.assertFalse(report.fits)
        self.assertIsNone(report.memory)
        self.assertRegex(report.reason, "RESOURCE_EXHAUSTED|memory")
        self.assertTrue(report.largest_is_compiled)
        self.assertBetween(report.largest_microbatch_size, 2**17, 2**20)

    @pytest.mark.slow
    def test_a_lambda_on_jax(self):
        """Run in a process of its own, because the tests run on TensorFlow."""
        program = (
            "from lars_keras import pod; from tests.pod import own_model\n"
            "make_model = lambda: own_model.make_model(8)\n"
            f"print(pod.check(make_model, {BATCH}, topology='v5e:2x2', batch_size=64, search=False))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
            cwd=pathlib.Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertIn("verdict      fits", done.stdout, done.stderr)

    @pytest.mark.slow
    def test_refusals_come_from_the_worker(self):
        with self.assertRaisesRegex(ValueError, "not compiled"):
            pod.check(f"{HERE}:not_compiled", BATCH, topology="v5e:2x2", batch_size=64)
        with self.assertRaisesRegex(RuntimeError, "`make_model` failed.*KeyError") as raised:
            pod.check(own_model.failing, BATCH, topology="v5e:2x2", batch_size=64)
        self.assertIn("own_model.py", raised.exception.__notes__[0])


class ImportTest(tf.test.TestCase):
    def test_nothing_of_the_checkout_is_imported(self):
        """So that it works where the wheel alone is installed."""
        folder = pathlib.Path(pod.__file__).parent
        above = {"train", "compare", "flags", "models", "running", "tools", "tests"}
        modules = set()
        for path in folder.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    self.assertEqual(node.level, 0)
                    modules.add(node.module.split(".")[0])
        self.assertIn("lars_keras", modules)
        self.assertEqual(modules & above, set())

    def test_importing_it_imports_neither_jax_nor_tensorflow(self):
        """`check` finds both in a process of its own; here only the module graph is read, of the whole library."""
        found, left = set(), [f"lars_keras.pod{name}" for name in ("", ".__main__", ".batch")]
        while left:
            name = left.pop()
            if name not in found and name.split(".")[0] == "lars_keras":
                found.add(name)
                left += imported_by(name)
        self.assertLessEqual({"lars_keras", "lars_keras.pod.driver", "lars_keras.trust_ratio"}, found)
        for name in found:
            imported = imported_by(name, in_functions=name.startswith("lars_keras.pod"))
            self.assertEqual({other.split(".")[0] for other in imported} & {"jax", "tensorflow"}, set(), name)


def imported_by(name, in_functions=False):
    """Return the modules that a module imports, and its package."""
    place = pathlib.Path(pod.__file__).parents[2].joinpath(*name.split("."))
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    imported = {name.rpartition(".")[0]} - {""}
    nodes = [*ast.parse(source.read_text()).body] if source.is_file() else []  # none of a class or function
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif in_functions or not isinstance(node, ast.FunctionDef):
            typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            nodes += [] if typing else ast.iter_child_nodes(node)
    return imported


if __name__ == "__main__":
    tf.test.main()
