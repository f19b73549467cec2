"""Code in README and docs: Python is run or says why not; commands are parsed. JAX and torch run README's, too."""

import contextlib
import os
import pathlib
import re
import tempfile
import unittest.mock
import warnings

import keras
import numpy as np
from absl.testing import parameterized

import lars_keras
from tests.peers import PEERS

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
PAGES = sorted(["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
WITH_PYTHON = [page for page in PAGES if "```python" in (ROOT / page).read_text() and "migrating" not in page]
TRAINER = "from lars_keras.training import Trainer"  # begins the second part of README
# Sizes of a real training, and those that the tests take.
SCALED = {
    "README.md": {
        "90 * math.ceil(len(images) / 4096)": "40 * math.ceil(len(images) / 450)",
        "batch_size=4096, epochs=90": "batch_size=450, epochs=40",
        "batch_size=8192, microbatch_size=256": "batch_size=64, microbatch_size=16",
        "epochs=90, validation": "epochs=1, validation",
    },
    "docs/noise_scale.md": {"batch_size=512, microbatch_size=64": "batch_size=64, microbatch_size=16"},
    "docs/quickstart.py": {"3 * 60": "3 * 30", "epochs=60": "epochs=30", "120": "60"},
    "docs/cifar10.py": {
        "IMAGES, EPOCHS = 10_240, 8": "IMAGES, EPOCHS = 160, 3",
        "GHOST, SMALL, LARGE = 64, 256, 2048": "GHOST, SMALL, LARGE = 16, 32, 64",
        "trained(momentum, SMALL, 0.05)\ntrained(momentum, LARGE, 0.4)\n": "",
        "trained(lars, SMALL, 10.0, ": "trainer = trained(lars, SMALL, 10.0, ",
        "trainer = trained(lars, LARGE, 20.0)": "",
    },
    "docs/tpu.py": {"EPOCHS = 4096, 512, 12": "EPOCHS = 1024, 64, 2"},
    "docs/running.md": {"batch_size=8192, microbatch_size=256": "batch_size=64, microbatch_size=16", "=90": "=1"},
    "docs/trainer.md": {"batch_size=8192, microbatch_size=256": "batch_size=64, microbatch_size=16", "=90": "=1"},
}


def blocks(page, language):
    """Return the blocks of a page in one language, as pairs of a reason not to run it, or None, and the code."""
    return [(m["reason"], m["code"]) for m in BLOCK.finditer((ROOT / page).read_text()) if m["language"] == language]


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.float32(data.images[..., None] / 16)
    return (images[:1350], data.target[:1350]), (images[1350:], data.target[1350:])


def network(normalize):
    """Return a small convolutional network with softmax, as in the example of README."""
    keras.utils.set_random_seed(0)
    layers = []
    for filters in (8, 16):
        layers += [keras.layers.Conv2D(filters, 3)]
        layers += [keras.layers.BatchNormalization(momentum=0.9)] if normalize else []
        layers += [keras.layers.ReLU()]
    head = [keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax")]
    return keras.Sequential([keras.Input((8, 8, 1)), *layers, *head])


def code_of(page):
    """Return the code of the blocks of a page that are run, with the sizes of the tests."""
    code = "\n".join(code for reason, code in blocks(page, "python") if not reason)
    for before, after in SCALED.get(page, {}).items():
        assert before in code, f"{page} has no {before}"
        code = code.replace(before, after)
    return code


def notebook_code(name):
    """Return the code of a notebook, with the sizes of the tests."""
    from tools import notebook

    (source,) = (source for source in notebook.SOURCES if source.stem == name)
    code = "\n".join(text for kind, text in notebook.cells_of(source.read_text()) if kind == "code")
    for before, after in SCALED[f"docs/{name}.py"].items():
        assert before in code, f"{name} has no {before}"
        code = code.replace(before, after)
    return code


class ReadmeTest(parameterized.TestCase):
    @parameterized.named_parameters(("plain", False), ("normalized", True))
    def test_networks_train_with_the_two_lines(self, normalize):
        (images, labels), test = digits()
        code = code_of("README.md").partition(TRAINER)[0]
        names = {"model": network(normalize), "images": images, "labels": labels}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Variables that are not adapted")
            exec(code, names)
        found = names["model"].predict(test[0], verbose=0).argmax(axis=1)
        self.assertGreater(np.mean(found == test[1]), 0.85)


class PagesTest(parameterized.TestCase):
    @parameterized.parameters(*WITH_PYTHON)
    def test_python(self, page):
        import tensorflow as tf

        (images, labels), (x, y) = digits()
        model = network(False)
        model.compile("sgd", "sparse_categorical_crossentropy", weighted_metrics=["accuracy"])
        names = {
            "model": model,
            "images": images[:128],
            "labels": labels[:128],
            "dataset": tf.data.Dataset.from_tensor_slices((images[:128], labels[:128])).batch(32),
            "test_set": tf.data.Dataset.from_tensor_slices((x, y)).batch(32),
        }
        code = code_of(page)
        if page == "README.md":  # its first part is that of ReadmeTest
            code = code[code.index(TRAINER) :]
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            exec(compile(code, page, "exec"), names)

    def test_quickstart(self):
        from tools import notebook

        for source in notebook.SOURCES:
            self.assertEqual(source.with_suffix(".ipynb").read_text(), notebook.notebook_of(source.read_text()))
        code, names = notebook_code("quickstart"), {}
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            exec(compile(code, "quickstart", "exec"), names)
        for score in (names["model"], names["trainer"]):
            found = score.evaluate(*names["test"])
            self.assertGreater(found["accuracy"] if isinstance(found, dict) else found[1], 0.85)

    def test_other_libraries_take_the_same_updates(self):
        names, theirs = {}, {}
        for reason, code in blocks("docs/migrating.md", "python"):
            if not reason:
                exec(code, names)
        names["mlperf"] = lars_keras.LARS(names["rate"], weight_decay=1e-4)
        random = np.random.default_rng(0)
        rates = [float(names["rate"](t)) for t in range(20)]
        weights = [random.normal(size=(4, 3)), random.normal(size=3)]
        gradients = [[random.normal(size=w.shape) for w in weights] for _ in rates]
        (code,) = (code for reason, code in blocks("docs/migrating.md", "python") if "optax.lars" in code)
        for line, name in zip(code.splitlines(), ("lars", "lamb"), strict=True):
            theirs[name] = by_optax(line, rates, weights, gradients)
        for name, rule in PEERS.items():
            peer = rule(weights)
            for lr, g in zip(rates, gradients, strict=True):
                peer.step(g, lr)
            theirs[name] = peer.weights
        for name, expected in theirs.items():
            variables = [
                keras.Variable(np.float32(w), name=n) for w, n in zip(weights, ("kernel", "bias"), strict=True)
            ]
            for g in gradients:
                names[name].apply([keras.ops.convert_to_tensor(np.float32(x)) for x in g], variables)
            for variable, e in zip(variables, expected, strict=True):
                found = np.asarray(keras.ops.convert_to_numpy(variable.value), "float64")
                self.assertLess(np.abs(found - e).max(), 1e-5 * np.abs(e).max(), f"{name}: {variable.path}")

    def test_what_is_not_run_has_a_reason_and_other_blocks_are_commands(self):
        for page in PAGES:
            fences = re.findall(r"^```(\w+)?$", (ROOT / page).read_text(), re.MULTILINE)
            found = len(blocks(page, "python")) + len(blocks(page, ""))
            self.assertEqual(len(fences), 2 * found, page)
            self.assertLessEqual({*fences}, {"", "python"}, page)
            for reason, code in blocks(page, ""):
                if not reason:
                    for command in code.replace("\\\n", " ").splitlines():
                        with self.subTest(page=page, command=command):
                            self.check(command)

    def check(self, command):
        """Check that a command calls what exists, with flags that exist. None is run, because they train or install."""
        import importlib.util
        import tomllib

        import flags
        from running.resume import flags_of_run
        from tools.comparison.command import define

        for part in filter(None, (p.strip() for p in command.partition("#")[0].split("&&"))):
            words = [word.strip("'\"") for word in part.split()]
            while "=" in words[0]:  # the environment
                words.pop(0)
            program = pathlib.Path(words[0]).name
            arguments = words[1:]
            if program == "make":
                self.assertRegex((ROOT / "Makefile").read_text(), rf"(?m)^{arguments[0]}:")
            elif program == "pip" and arguments[0] == "install":
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                for extra in re.findall(r"\[([\w,-]+)\]", " ".join(arguments)):
                    self.assertLessEqual(set(extra.split(",")), set(extras))
            elif arguments[0] == "-m":
                self.assertIsNotNone(importlib.util.find_spec(arguments[1]))
                if used := re.findall(r" --(\w+)", part):
                    self.assertLessEqual({*used}, options_of(arguments[1]), part)
            else:
                self.assertIn(program, ("python", "python3"))
                with contextlib.chdir(ROOT):
                    if arguments[0] == "compare.py":
                        define()(arguments)
                    else:
                        self.assertEqual(arguments[0], "train.py")
                        values, rest = flags.parse(arguments, flags_of_run)
                        self.assertEqual(rest, [])
                        flags.read(values)


def options_of(module):
    """Return the names of the long options of a program, from its parser; `tools.pod_check` has those of `train.py`."""
    import argparse
    import importlib.util

    import flags

    class Found(Exception):
        """Carries the parser out of the program, before it parses."""

    def find(parser, *_):
        raise Found(parser)

    package = importlib.util.find_spec(module).submodule_search_locations is not None
    program = importlib.import_module(f"{module}.__main__" if package else module)
    with unittest.mock.patch.object(argparse.ArgumentParser, "parse_known_args", find):
        try:
            program.main([])
        except Found as found:
            options = set(found.args[0]._option_string_actions)
    names = {option.removeprefix("--") for option in options if option.startswith("--")}
    return names | {"flagfile", *flags.parse(["train.py"])[0]} if module == "tools.pod_check" else names


def by_optax(expression, rates, weights, gradients):
    """Return the weights after the updates of an optimizer of optax."""
    import jax.numpy as jnp
    import optax

    optimizer = eval(expression, {"optax": optax, "rate": lambda count: jnp.asarray(rates)[count]})
    w = [jnp.asarray(x, "float32") for x in weights]
    state = optimizer.init(w)
    for g in gradients:
        update, state = optimizer.update([jnp.asarray(x, "float32") for x in g], state, w)
        w = optax.apply_updates(w, update)
    return [np.asarray(x, "float64") for x in w]


if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
    del PagesTest  # its examples are made for TensorFlow, and are those of one backend
