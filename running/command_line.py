"""Run a program from its command line to its exit code."""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import tensorflow as tf
from absl import flags as absl_flags

import flags
from lars_keras.report.progress import say
from lars_keras.runtime.errors import Diverged, Preempted, TooManyUnreadableImages, UsageError
from lars_keras.training.cluster import has_peers, is_host_lost
from running import exit_codes
from running.errors import in_flags, usage_errors
from running.help_text import entry, flag_entry
from running.logs import show_warnings
from running.resume import flags_of_run

# Groups of the help, each from this flag on, and what most people need first.
_GROUPS = {
    "model": "Model and data",
    "run_dir": "Run folder",
    "batch_size": "Batch and length",
    "optimizer": "Optimizer and schedule",
    "strategy": "Devices and precision",
    "eval_every": "Evaluation, seed and telemetry",
    "checkpoint_minutes": "Checkpoints and recovery",
}
_FLAGFILE = (
    "Read flags from this recipe; later flags replace its own. If they replace its optimizer or schedule, its flags of "
    "another one are dropped."
)
_AGREED = (0, exit_codes.DIVERGED, exit_codes.BAD_DATA, exit_codes.PREEMPTED)  # on all hosts, after the same update
_FIRST = ("data_dir", "run_dir", "strategy", "dry_run")


def run(main: Callable[[flags.RunConfig], None], argv: Sequence[str], usage: str | None) -> int:
    """Run `main` with the flags in `argv`, and return the exit code of the process.

    Args:
        main: the program.
        argv: the name of the program, then its flags.
        usage: the first text of `--help`.
    """
    show_warnings()

    def end(code: int, message: str) -> int:
        say(f"train.py: {message}", sys.stderr)
        return code

    try:
        values, arguments = flags.parse(argv, flags_of_run)
        if values["help"].value:
            say(f"{usage}\n{_help()}")
            return 0
        with usage_errors():
            if arguments:
                raise UsageError(f"Every argument must be a flag, --name=value. Received: {' '.join(arguments)}")
            config = flags.read(values)
        main(config)
    except (absl_flags.Error, UsageError) as e:
        return end(exit_codes.USAGE, f"error: {in_flags(str(e))}")
    except Diverged as e:
        hint = "A lower --learning_rate or a longer --warmup may help; the checkpoints are from before."
        return end(exit_codes.DIVERGED, f"{e} {hint}")
    except TooManyUnreadableImages as e:
        return end(exit_codes.BAD_DATA, in_flags(str(e)))
    except Preempted as e:
        return end(exit_codes.PREEMPTED, f"{e}, saved; start it again with the same --run_dir to go on")
    except OSError as e:
        return end(exit_codes.NOT_SAVED, f"cannot write or read: {e}. Checkpoints that were written before are whole.")
    except (tf.errors.OpError, RuntimeError, ValueError) as e:
        if not is_host_lost(e):
            raise
        return end(exit_codes.HOST_LOST, f"another host is gone: {str(e).splitlines()[0]}")
    return 0


def leave(program: Callable[[], int]) -> NoReturn:
    """Run a program, and end the process with the exit code that it returns.

    On JAX, a process that fails while others run leaves at once. At an ordinary exit JAX would wait for the others,
    while they wait in a collective for this one. If all processes end in the same way, they wait for each other.
    """
    try:
        code = program()
    except (Exception, KeyboardInterrupt):
        if not has_peers():
            raise
        traceback.print_exc()
        code = exit_codes.FAILED
    if code not in _AGREED and has_peers():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _help() -> str:
    """Return the help: the flags that most people need first, then all of them by group."""
    fields = {field.name: field for field in dataclasses.fields(flags.RunConfig)}
    lines = ["Needed first", *entry("--flagfile=FILE", _FLAGFILE)]
    for name in _FIRST:
        lines += _flag_entry(fields[name])
    for name, field in fields.items():
        if name in _GROUPS:
            lines += ["", _GROUPS[name]]
        lines += _flag_entry(field)
    return "\n".join(lines)


def _flag_entry(field: dataclasses.Field) -> list[str]:
    meta = field.metadata
    return flag_entry(field.name, meta["kind"], meta["help"], field.default, meta["options"].get("enum_values"))
