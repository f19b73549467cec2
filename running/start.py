"""First import of `train.py` and `compare.py`: settings of TensorFlow, then TensorFlow itself, without its remarks.

While oneDNN is on, TensorFlow 2.21 says so in four lines, whatever its log level.
"""

import importlib.util
import os
import signal
import sys
from types import TracebackType

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before the first import of TensorFlow
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # by itself only with AVX-512, see BUILD-notes.md

_REMARKS = (b"oneDNN custom operations are on", b"before absl::InitializeLog() is called")


def _one_line_for_ctrl_c(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Say "interrupted" where Python would show the middle of an import. During training, runs stop by themselves."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _one_line_for_ctrl_c


def import_quietly(*modules: str) -> None:
    """Import modules, and drop the remarks that TensorFlow writes to standard error meanwhile.

    Another process filters the lines, so a message of an import that aborts is not lost.

    Args:
        *modules: names of the modules, in the order of import.
    """
    loaded = {"keras", "tensorflow", "jax", "torch"} & sys.modules.keys()
    if loaded or not hasattr(os, "fork"):  # they may have started threads, and a process with threads must not fork
        for name in modules:
            importlib.import_module(name)
        return
    source, sink = os.pipe()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(sink)
        _filter(source)
    os.close(source)
    stderr = os.dup(2)
    os.dup2(sink, 2)
    os.close(sink)
    try:
        for name in modules:
            importlib.import_module(name)
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        os.waitpid(child, 0)


def _filter(source: int) -> None:
    """Copy lines from a pipe to standard error, without the remarks, and end the process."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # it ends with the pipe
        with os.fdopen(source, "rb") as lines:
            for line in lines:
                if not any(remark in line for remark in _REMARKS):
                    os.write(2, line)
    finally:
        os._exit(0)


def _check_backend() -> None:
    """End the program if the Keras backend that was asked for is not installed, or does not exist."""
    name = os.environ.get("KERAS_BACKEND")
    if name and not importlib.util.find_spec(name):
        print(f"error: the backend is not installed, or misspelled. Received: KERAS_BACKEND={name}", file=sys.stderr)
        sys.exit(2)


def _check_packages() -> None:
    """End the program if a package is missing that it needs on every backend."""
    extras = {"tensorflow": "tensorflow", **dict.fromkeys(("absl", "jinja2", "matplotlib", "psutil"), "train")}
    missing = [name for name in extras if not importlib.util.find_spec(name)]
    if missing:
        wanted = ",".join(dict.fromkeys(extras[name] for name in missing))
        print(
            f"error: not installed: {', '.join(missing)}. They are needed on JAX, too. Install the project with its "
            f'extras: pip install -e ".[{wanted}]"',
            file=sys.stderr,
        )
        sys.exit(2)


_check_packages()
_check_backend()
import_quietly("keras", "tensorflow")
