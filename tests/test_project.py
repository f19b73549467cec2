"""What the files of the project promise beside their code."""

import json
import os
import pathlib
import re
import subprocess
import sys

import tensorflow as tf

import lars_keras

ROOT = pathlib.Path(__file__).parents[1]
# The brackets keep this file from matching itself.
REGISTRIES = r"py[p]i\.org|python[h]osted|[c]onda\.anaconda|download\.py[t]orch"
MACHINE_PATHS = r"(?<![\w.})~*])/(?:home|root|tmp|work|opt|Users)/\w"


def modules_after_import(backend):
    """Returns the top-level modules that `import lars_keras` loads in a new process."""
    program = "import sys, lars_keras, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    return json.loads(done.stdout)


class ProjectTest(tf.test.TestCase):
    def tracked_files(self):
        """Returns the files of the checkout that git does not ignore."""
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

    def test_import_brings_keras_only(self):
        modules = modules_after_import("tensorflow")
        self.assertIn("keras", modules)
        self.assertNotIn("tensorflow_datasets", modules)
        self.assertNotIn("keras_cv", modules)

    def test_import_on_jax_brings_no_tensorflow(self):
        modules = modules_after_import("jax")
        self.assertIn("keras", modules)
        self.assertEqual([m for m in modules if m.startswith("tensorflow")], [])

    def test_version_is_the_newest_of_the_changelog(self):
        versions = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        self.assertEqual(versions[0], lars_keras.__version__)

    def test_lock_pins_everything_by_hash(self):
        text = (ROOT / "requirements" / "dev.txt").read_text().replace("\\\n", "")
        lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
        self.assertIn("keras==3.15.1", [line.split()[0] for line in lines])
        for line in lines:
            self.assertRegex(line, r"^[\w.-]+==[\w.]+ +(; [^#]*?)?(--hash=sha256:[0-9a-f]{64} *)+$")


if __name__ == "__main__":
    tf.test.main()
