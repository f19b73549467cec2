"""Parse the command line into a `RunConfig`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from flags.config import RunConfig
from running import renamed
from running.optimizers import OPTIMIZER_FLAGS, SCHEDULE_FLAGS


class _TypedFlags(flags.FlagValues):
    """Holds the flags of the command line itself: flagfiles are not read."""

    def read_flags_from_files(self, argv: Sequence[str], force_gnu: bool = True) -> list[str]:
        return list(argv)


def define() -> flags.FlagValues:
    """Define all flags, with their defaults, apart from absl's global ones."""
    values = flags.FlagValues()
    for field in dataclasses.fields(RunConfig):
        make = getattr(flags, f"DEFINE_{field.metadata['kind']}")
        text, options = field.metadata["help"], field.metadata["options"]
        make(field.name, field.default, help=text, flag_values=values, **options)
    flags.DEFINE_bool("help", False, "Show all flags.", short_name="h", flag_values=values)
    return values


def parse(
    argv: Sequence[str], flags_of_run: Callable[[str], Sequence[str]] | None = None
) -> tuple[flags.FlagValues, list[str]]:
    """Parse the flags in `argv`, on top of the flags of the run that they resume.

    If the command line replaces the optimizer or schedule of a flagfile, the flagfile's flags for the old one have no
    effect, and are not refused.

    Args:
        argv: the program's name, then its arguments.
        flags_of_run: returns lines of flags for the value of `--run_dir`. They are never refused for the optimizer or
            schedule, because the user did not give them.

    Returns:
        The flags, and the arguments that are not flags.

    Raises:
        absl.flags.Error: if a flag is unknown, out of range, or without a meaning for the optimizer or schedule.
    """
    given = values = define()
    try:
        arguments = given(argv)
        if flags_of_run and given["run_dir"].value and (before := flags_of_run(given["run_dir"].value)):
            values = define()
            if given["eval_only"].value:  # on the test split, even if rates were chosen on held-out images
                before = [line for line in before if not line.startswith("--validation_split=")]
            arguments = values([argv[0], *before, *argv[1:]])
    except (UnicodeDecodeError, OSError) as e:
        raise flags.Error(f"--flagfile is not a readable text file: {e}") from e
    except ValueError as e:  # of a switch that is given a value
        raise flags.Error(str(e)) from e
    except flags.UnrecognizedFlagError as e:
        name = e.flagname.removeprefix("no") if e.flagname.removeprefix("no") in renamed.FLAGS else e.flagname
        if name not in renamed.FLAGS:
            raise
        raise flags.Error(f"--{name} was renamed to --{renamed.FLAGS[name]}.") from e
    typed = _TypedFlags()
    typed.append_flag_values(define())
    flags.DEFINE_string("flagfile", None, "Not read.", flag_values=typed)
    typed(argv)
    _refuse_meaningless(typed, given, values)
    steps = values["steps"].value
    if typed["epochs"].present and not typed["steps"].present and steps is not None and not values["eval_only"].value:
        raise flags.IllegalFlagValueError(
            f"--epochs has no effect beside the --steps={steps} of the flagfile or of the run: give --steps. Received: "
            f"--epochs={typed['epochs'].value:g}"
        )
    if flags_of_run and given is values:
        _refuse_no_run(given)
    return values, arguments[1:]


def _refuse_no_run(given: flags.FlagValues) -> None:
    """Refuse to start a run of defaults where the user may have meant to resume one."""
    run_dir = given["run_dir"].value
    chosen = [field.name for field in dataclasses.fields(RunConfig) if field.metadata["affects_result"]]
    if run_dir and not any(given[name].present for name in (*chosen, "eval_only", "dry_run", "help")):
        raise flags.IllegalFlagValueError(
            f"There is no run to resume in --run_dir={run_dir}. To start one there, give its flags, such as --model or "
            "--flagfile."
        )


def _refuse_meaningless(typed: flags.FlagValues, given: flags.FlagValues, values: flags.FlagValues) -> None:
    """Refuse flags of another optimizer or schedule, even if their value is the default."""
    for owner, table in (("optimizer", OPTIMIZER_FLAGS), ("schedule", SCHEDULE_FLAGS)):
        chosen = values[owner].value
        meant = typed if typed[owner].present else given
        for name, owners in table.items():
            if meant[name].present and chosen not in owners:
                raise flags.IllegalFlagValueError(
                    f"--{name} needs --{owner}={' or '.join(owners)}. Received: --{name}={meant[name].value} "
                    f"--{owner}={chosen}"
                )
    optimizer = values["optimizer"].value
    meant = typed if typed["optimizer"].present or typed["weight_decay"].present else given
    same_rate = optimizer == "adam" or values["bias_lr_scale"].value == 1.0
    without_effect = same_rate and optimizer not in ("lars", "lamb") and values["weight_decay"].value == 0.0
    if meant["exclude"].present and without_effect:
        other = "" if optimizer == "adam" else " or --bias_lr_scale other than 1"
        raise flags.IllegalFlagValueError(
            f"--exclude needs --weight_decay above 0{other} with --optimizer={optimizer}, which adapts no layer. "
            "Received: --weight_decay=0"
        )
    if not same_rate and optimizer in ("sgd", "momentum") and values["exclude"].value == []:
        raise flags.IllegalFlagValueError(
            "--bias_lr_scale other than 1 needs variables in --exclude. Received: --exclude= "
            f"--bias_lr_scale={values['bias_lr_scale'].value:g}"
        )


def read(values: flags.FlagValues) -> RunConfig:
    """Return the parsed flags as a `RunConfig`.

    Raises:
        ValueError: if flags contradict each other.
    """
    settings: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(RunConfig)}
    if settings["exclude"] is not None:
        settings["exclude"] = tuple(settings["exclude"])
    return RunConfig(**settings)
