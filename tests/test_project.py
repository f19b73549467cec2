"""What the files of the project promise beside their code."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tensorflow as tf

import lars_keras

ROOT = pathlib.Path(__file__).parents[1]
# The brackets keep this file from matching itself.
REGISTRIES = r"py[p]i\.org|python[h]osted|[c]onda\.anaconda|download\.py[t]orch"
MACHINE_PATHS = r"(?<![\w.})~*])/(?:home|root|tmp|work|opt|Users)/\w"


ABOVE = {"compare", "flags", "models", "running", "tests", "tools", "train"}  # what is not installed

IMPORTS = """
import importlib, json, sys
import keras
def top():
    return {name.partition(".")[0] for name in sys.modules}
before = top()
import lars_keras
found = {"lars_keras": sorted(top() - before - set(sys.stdlib_module_names))}
for name in sys.argv[1:]:
    importlib.import_module(name)
found["tensorflow"] = sorted(name for name in top() if name.startswith("tensorflow"))
print(json.dumps(found))
"""


def imports_in_new_process(backend, *more):
    """Return the top-level modules that `import lars_keras` adds to keras's, and those of TensorFlow after `more`."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTS, *more],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    return json.loads(done.stdout)


def library():
    """Return the syntax tree of every module of the library, by its dotted name."""
    trees = {}
    for path in sorted((ROOT / "lars_keras").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return trees


def imported(tree, anywhere):
    """Yield the dotted names that a module imports when it is loaded, or `anywhere` in it."""
    for node in ast.walk(tree) if anywhere else at_load(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def at_load(tree):
    """Yield the nodes that run when a module is loaded, so not those in functions and under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from at_load(node)


def circles(graph):
    """Return the modules that import themselves by way of others."""

    def reached(name, seen):
        for other in graph[name] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    return sorted(name for name in graph if name in reached(name, set()))


def texts(tree):
    """Yield line and text of every string, an f-string as one with {} for its values."""
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= set(node.values)
            yield node.lineno, "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            parts |= {argument for argument in node.args if isinstance(argument, ast.Constant)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield node.lineno, node.value


def flags_in(text):
    """Return what looks like a flag in a text of the library.

    Allowed are flags in a command of the library's own programs (`python -m lars_keras...`, to the end of its line) and
    in fenced examples.
    """
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"python -m lars_keras\.(?:.*\\\n)*.*", "", text)
    return re.findall(r"--[a-z][\w-]*", text)


class ProjectTest(tf.test.TestCase):
    def tracked_files(self):
        """Return the files of the checkout that git does not ignore."""
        if not (ROOT / ".git").exists():
            self.skipTest("not a git checkout")
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        files = [ROOT / name for name in listing.split("\0") if (ROOT / name).is_file()]
        self.assertIn(ROOT / "pyproject.toml", files)
        return files

    def test_files_name_no_registry_and_no_path_of_one_machine(self):
        found = [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for path in self.tracked_files()
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
            if re.search(f"{REGISTRIES}|{MACHINE_PATHS}", line)
        ]
        self.assertEqual(found, [])

    def test_python_files_are_short(self):
        files = [path for path in self.tracked_files() if path.suffix == ".py"]
        self.assertIn(ROOT / "lars_keras" / "lars.py", files)
        lengths = {path: len(path.read_text().splitlines()) for path in files}
        self.assertEqual([f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n >= 450], [])

    @pytest.mark.slow  # the next one says it of JAX
    def test_import_brings_keras_only(self):
        self.assertEqual(imports_in_new_process("tensorflow")["lars_keras"], ["lars_keras"])

    def test_import_on_jax_brings_no_tensorflow(self):
        of_tensorflow = "lars_keras.training.tensorflow"
        rooms = [name for name in library() if name.startswith(("lars_keras.training", "lars_keras.runtime"))]
        found = imports_in_new_process("jax", *(name for name in rooms if not name.startswith(of_tensorflow)))
        self.assertEqual(found["lars_keras"], ["lars_keras"])
        self.expect([f"lars_keras.training or runtime: {name}" for name in found["tensorflow"]])

    def expect(self, offences):
        """Check that there are no offences."""
        self.assertEqual(list(offences), [])

    def test_the_library_imports_nothing_above_it(self):
        self.expect(
            f"{name} imports {other}"
            for name, tree in library().items()
            for other in imported(tree, anywhere=True)
            if other.partition(".")[0] in ABOVE
        )

    def test_the_library_has_no_import_circles(self):
        trees = library()
        graph = {}
        for name, tree in trees.items():
            others = list(imported(tree, anywhere=False))
            graph[name] = {o if o in trees else o.rpartition(".")[0] for o in others} & set(trees)
        self.assertIn("lars_keras.layerwise", graph["lars_keras.lars"])
        self.expect(f"{name} imports itself" for name in circles(graph))
        self.assertEqual(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}), ["b", "c"])

    def test_the_library_speaks_of_arguments_not_of_flags(self):
        self.expect(
            f"{name}: {flag}" for name, tree in library().items() for _, text in texts(tree) for flag in flags_in(text)
        )
        self.assertEqual(flags_in("Use --strategy=single, or --tpu."), ["--strategy", "--tpu"])
        self.assertEqual(flags_in("Run python -m lars_keras.data.prepare --dataset=x\nor --tpu"), ["--tpu"])

    def test_version_is_the_newest_of_the_changelog(self):
        versions = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        self.assertEqual(versions[0], lars_keras.__version__)
        cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
        self.assertEqual(cited, [lars_keras.__version__])

    def pinned(self, name):
        """Return what a lock pins, each package with its version, after checking that all have hashes."""
        text = (ROOT / "requirements" / name).read_text().replace("\\\n", "")
        lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
        for line in lines:
            self.assertRegex(line, r"^[\w.-]+==[\w.]+ +(; [^#]*?)?(--hash=sha256:[0-9a-f]{64} *)+$")
        return {line.split()[0] for line in lines}

    def test_locks_pin_everything_by_hash(self):
        everything, demo, docs = (self.pinned(f"{name}.txt") for name in ("dev", "demo", "docs"))
        self.assertTrue(any(pin.startswith("mkdocs-material==") for pin in docs))
        self.assertIn("keras==3.15.1", demo)
        self.assertEqual(demo - everything, set())  # `make test` adds the rest to the same environment


if __name__ == "__main__":
    tf.test.main()
