"""The command line of `compare.py`: flags, candidates, data, the grid, then the runs and the page."""

import contextlib
import dataclasses
import math
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
from absl import flags as absl_flags

import flags
from lars_keras import data as datasets
from lars_keras.data.limits import cores
from lars_keras.files import local_path
from lars_keras.reference import Reference
from lars_keras.report.progress import say
from lars_keras.runtime.errors import UsageError
from lars_keras.runtime.folder_lock import lock_folder
from lars_keras.versions import versions
from running import exit_codes
from running.errors import in_flags, usage_errors
from running.help_text import entry, flag_entry
from running.logs import show_warnings
from running.optimizers import OPTIMIZERS
from tools.comparison import page
from tools.comparison.candidates import FIRST_RATES, FIRST_RATES_BATCH, SCALINGS, Candidate
from tools.comparison.runner import Runner
from tools.comparison.search import RULE, GridCell, ModeTrial, grid
from tools.comparison.store import ResultsStore

PACKAGES = ("lars-keras", "keras", "tensorflow", "tensorflow-cpu", "jax", "numpy")


def define() -> absl_flags.FlagValues:
    """Return the flags with their defaults, apart from absl's global ones."""
    own = absl_flags.FlagValues()
    at_least: Any = {"flag_values": own, "lower_bound": 0}
    absl_flags.DEFINE_list(
        "recipes",
        None,
        "Compare optimizers on this flagfile of train.py; or compare several flagfiles, each with its own optimizer.",
        flag_values=own,
    )
    absl_flags.DEFINE_multi_enum(
        "optimizer",
        list(OPTIMIZERS),
        OPTIMIZERS,
        "Compare this optimizer; repeat the flag. Default: all.",
        flag_values=own,
    )
    absl_flags.DEFINE_list(
        "batch_sizes", None, "Train at these global batches. Default: the recipe's.", flag_values=own
    )
    absl_flags.DEFINE_list("seeds", ["0", "1", "2"], "Train with each of these seeds. Default: 0,1,2.", flag_values=own)
    absl_flags.DEFINE_float("epochs", None, "Train for this many epochs instead of the recipe's.", **at_least)
    absl_flags.DEFINE_integer(
        "tuning_runs",
        8,
        "Choose the rate of each cell by this many runs of a quarter of the length, the best quarter of which goes on "
        "to full length. 0: keep the recipe's rate; other optimizers take the rate at which their search would begin.",
        **at_least,
    )
    absl_flags.DEFINE_float("factor", 3.0, "Set the ratio of neighboring rates of the search.", flag_values=own)
    absl_flags.DEFINE_enum(
        "scaling", "sqrt", list(SCALINGS), "Scale the first rate with the batch size by this rule.", flag_values=own
    )
    absl_flags.DEFINE_float(
        "validation_split",
        0.1,
        "Hold out this fraction of the training images to choose rates by.",
        **at_least,
        upper_bound=0.5,
    )
    absl_flags.DEFINE_enum(
        "jit_compile",
        "fastest",
        ["fastest", "on", "off", "recipe"],
        "Compile all runs by XLA, or none, or as the recipe says; fastest times both on this machine first.",
        flag_values=own,
    )
    absl_flags.DEFINE_string("data_dir", None, "Read the data from here instead of the recipe's.", flag_values=own)
    absl_flags.DEFINE_string("out", "runs/compare", "Write all results to this folder.", flag_values=own)
    absl_flags.DEFINE_integer(
        "workers",
        None,
        "Train this many runs at a time. Default: one a core; one if there is an accelerator.",
        **at_least,
    )
    absl_flags.DEFINE_bool("help", False, "Show all flags.", short_name="h", flag_values=own)
    return own


def _help(own: absl_flags.FlagValues) -> str:
    """Return the help: all flags, in the order of their definition."""
    lines = entry("--flagfile=FILE", "Read flags from this file; later flags replace its own.")
    (defined,) = own.flags_by_module_dict().values()
    for flag in defined:
        text = re.sub("^<.*?>: |;\n.*", "", flag.help, flags=re.DOTALL)  # absl puts the choices around it
        choices = getattr(flag.parser, "enum_values", None)
        lines += flag_entry(flag.name, flag.flag_type(), text, flag.default, choices)
    return "\n".join(lines)


def candidates_of(own: absl_flags.FlagValues) -> list[Candidate]:
    """Return the candidates: optimizers on one recipe, or recipes.

    Raises:
        UsageError: if a recipe is missing, or flags contradict each other.
    """
    if not own.recipes:
        raise UsageError("--recipes is needed: one flagfile of train.py, or several. Received: none")
    configs = {Path(name).stem: _recipe(name, own) for name in own.recipes}
    if len(configs) < len(own.recipes):
        raise UsageError(f"--recipes need file names that differ. Received: {','.join(own.recipes)}")
    if len(configs) > 1:
        if not own["optimizer"].using_default_value:
            raise UsageError("--optimizer needs a single recipe; several are compared as they are.")
        if not own.batch_sizes and len({c.batch_size for c in configs.values()}) > 1:
            raise UsageError("--batch_sizes is needed, because the recipes have several. Received: none")
        return [Candidate(name, c, c.learning_rate, c.batch_size, own.scaling) for name, c in configs.items()]
    (config,) = configs.values()
    found = []
    for name in dict.fromkeys(own.optimizer):
        rate, batch_size = FIRST_RATES[name], FIRST_RATES_BATCH
        if name == config.optimizer and not own.tuning_runs:
            rate, batch_size = config.learning_rate, config.batch_size
        found.append(Candidate(name, dataclasses.replace(config, optimizer=name), rate, batch_size, own.scaling))
    return found


def _recipe(name: str, own: absl_flags.FlagValues) -> flags.RunConfig:
    if not Path(name).is_file():
        raise UsageError(f"--recipes: there is no file {name}.")
    values, arguments = flags.parse(["train.py", f"--flagfile={name}"])
    if arguments:
        raise UsageError(f"--recipes={name} holds words that are no flags: {' '.join(arguments)}")
    changed: dict[str, Any] = {key: own[key].value for key in ("epochs", "data_dir") if own[key].value is not None}
    if "epochs" in changed:
        changed["steps"] = None
    return dataclasses.replace(flags.read(values), **changed)


def _whole_numbers(own: absl_flags.FlagValues, name: str, least: int) -> list[int]:
    texts: list[str] = own[name].value or []
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise UsageError(
            f"--{name} must be whole numbers of at least {least}, such as 1,2. Received: {','.join(texts)}"
        )
    return sorted(set(numbers))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison that is ready to run.

    Args:
        cells: the grid.
        trials: trials of graph mode against XLA.
        mode: `--jit_compile` of the models that have no trials; None if recipes decide.
        store: the results so far.
        out: folder of the results.
        workers: number of runs at a time.
        plan: lines that describe it.
    """

    cells: list[GridCell]
    trials: list[ModeTrial]
    mode: str | None
    store: ResultsStore
    out: Path
    workers: int
    plan: Sequence[str]


def command_of(argv: Sequence[str]) -> str:
    """Return the command as results show it: without the folder of the data, which may tell a user's name."""
    return re.sub(r"(--?data_dir)[= ]\S+", r"\1=DIR", " ".join(["python compare.py", *argv[1:]]))


def prepare(own: absl_flags.FlagValues, argv: Sequence[str], held: contextlib.ExitStack) -> Comparison:
    """Check the flags, prepare the data and read the results so far. `held` holds the folder for this process.

    Raises:
        UsageError: if a flag or file is refused.
    """
    _check(own)
    out = local_path(own.out, "out")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out={out} is not a folder.")
    candidates = candidates_of(own)
    batch_sizes = _whole_numbers(own, "batch_sizes", 1) if own.batch_sizes else [candidates[0].config.batch_size]
    seeds = _whole_numbers(own, "seeds", 0)
    for candidate in candidates:  # so a bad flag is reported at once
        if candidate.config.steps and len(batch_sizes) > 1:
            raise UsageError(
                "--steps in a recipe is another number of epochs at each of --batch_sizes: give --epochs. Received: "
                f"--steps={candidate.config.steps} --batch_sizes={','.join(map(str, batch_sizes))}"
            )
        for batch_size in batch_sizes:
            candidate.sized(batch_size)
    accelerator = _hide_accelerators()
    for config in (c.config for c in candidates):
        if config.is_own_model:
            Reference(config.model, "model").resolve()
    candidates = _with_data(candidates)
    cells = grid(candidates, batch_sizes, own.tuning_runs, own.factor, seeds)
    for cell in cells:  # a flag may be bad for this number of images
        for stage in ("short", "tuning", "seed") if own.tuning_runs else ("seed",):
            cell.job(0.0, stage).config(out, own.validation_split)
    try:
        held.enter_context(lock_folder(out, "out"))
    except OSError as e:
        raise UsageError(f"--out={out} cannot be written: {e.strerror}") from e
    about = _about(own, argv, candidates, batch_sizes, seeds)
    store = ResultsStore(out, about, cells)
    timed = own.jit_compile == "fastest" and keras.config.backend() == "tensorflow" and not accelerator
    by_model = {c.config.model: c for c in reversed(candidates)}
    asked = {cell.candidate.config.model for cell in cells if cell.lengths_left(store.outcomes)} - store.modes.keys()
    trials = [ModeTrial(c, batch_sizes[0]) for model, c in by_model.items() if timed and model in asked]
    workers = own.workers or (1 if accelerator or keras.config.backend() == "jax" else cores())  # JAX takes all cores
    left = store.left + sum(len(trial.jobs(store.outcomes)) for trial in trials)
    plan = (
        *_plan(candidates, about["settings"]),
        f"runs        {len(store.outcomes)} finished, {left} left, {workers} at a time",
        f"results     {out}/compare.html",
    )
    mode = own.jit_compile if own.jit_compile in ("on", "off") else None
    return Comparison(cells, trials, mode, store, out, workers, plan)


def _check(own: absl_flags.FlagValues) -> None:
    for name in ("epochs", "factor", "validation_split"):
        number: float | None = own[name].value
        if number is not None and not math.isfinite(number):
            raise UsageError(f"--{name} must be finite. Received: --{name}={number}")
    if own.factor < 1.01:  # rates are rounded to four digits
        raise UsageError(f"--factor must be a number of at least 1.01. Received: --factor={own.factor:g}")
    if own.tuning_runs and not own.validation_split:
        raise UsageError("--validation_split must be above 0 if --tuning_runs is. Received: --validation_split=0")


def _with_data(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates with facts of their data, which are prepared before several processes read them."""
    data: dict[tuple[str | None, ...], datasets.ImageData] = {}
    for config in (c.config for c in candidates):
        data[config.dataset, config.data_dir, config.resized] = datasets.load(
            config.dataset,
            data_dir=config.data_dir,
            resized=config.resized,
            cache="disk" if config.cache == "disk" else "none",
            cache_dir=config.cache_dir,
        )
    own = [data[c.config.dataset, c.config.data_dir, c.config.resized] for c in candidates]
    return [
        dataclasses.replace(c, num_classes=found.num_classes, num_train=found.num_train, fingerprint=found.fingerprint)
        for c, found in zip(candidates, own, strict=True)
    ]


def _about(
    own: absl_flags.FlagValues,
    argv: Sequence[str],
    candidates: Sequence[Candidate],
    batch_sizes: Sequence[int],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Return what the results say of the comparison: title, command, machine, versions and settings."""
    names = ", ".join(c.name for c in candidates)
    networks = _joined(c.config.model for c in candidates)
    return {
        "title": f"{networks} on {_joined(c.config.dataset for c in candidates)}: {names}",
        "command": command_of(argv),
        "machine": f"{platform.machine()}, {cores()} cores",
        "commit": _commit(),
        "versions": versions(PACKAGES),
        "settings": {
            # Without the folder of the data, as in the command: the same data may have moved.
            "candidates": {c.name: dataclasses.replace(c.config, data_dir=None).as_flags() for c in candidates},
            "data": {c.name: c.fingerprint for c in candidates},
            "batch_sizes": batch_sizes,
            "seeds": seeds,
            "backend": keras.config.backend(),
            "search": RULE if own.tuning_runs else None,
            "tuning_runs": own.tuning_runs,
            "factor": own.factor,
            "scaling": own.scaling,
            "validation_split": own.validation_split,
            "jit_compile": None if own.jit_compile == "recipe" else own.jit_compile,
        },
    }


def _plan(candidates: Sequence[Candidate], settings: dict[str, Any]) -> tuple[str, ...]:
    """Return lines that say what is compared."""
    names = ", ".join(c.name for c in candidates)
    networks = _joined(c.config.model for c in candidates)
    configs = [c.config for c in candidates]
    lengths = _joined(f"{c.steps:,} updates" if c.steps else f"{c.epochs:g} epochs" for c in configs)
    data = {(c.config.dataset, c.config.data_dir): c.num_train for c in candidates}
    images = " and ".join(f"{num_train:,}" for num_train in data.values())
    batch_sizes, seeds = (", ".join(map(str, settings[name])) for name in ("batch_sizes", "seeds"))
    rates = page.search_rule(settings) if settings["tuning_runs"] else "the recipe's"
    return (
        f"compared    {names}: {networks}, {lengths} on {images} images",
        f"batches     {batch_sizes}; seeds {seeds}",
        f"rates       {rates}",
    )


def _joined(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def _hide_accelerators() -> bool:
    """Leave GPUs and TPUs to the processes of the runs, and return True if TensorFlow has any."""
    import tensorflow as tf

    kinds = [kind for kind in ("GPU", "TPU") if tf.config.list_physical_devices(kind)]
    for kind in kinds:
        tf.config.set_visible_devices([], kind)
    return bool(kinds)


def _commit() -> str | None:
    """Return the commit of the checkout, with -dirty if it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(argv: Sequence[str], usage: str | None = None) -> int:
    """Run the comparison that the flags in `argv` ask for.

    Args:
        argv: name of the program, then its flags.
        usage: begins the text of `--help`.

    Returns:
        The exit code of the process.
    """
    show_warnings()
    with contextlib.ExitStack() as held:
        return _run(argv, usage, held)


def _run(argv: Sequence[str], usage: str | None, held: contextlib.ExitStack) -> int:
    own = define()
    try:
        with usage_errors():
            arguments = own(argv)[1:]
            if own.help:
                say(f"{usage}\n{_help(own)}")
                return 0
            if arguments:
                raise UsageError(f"Every argument must be a flag, --name=value. Received: {' '.join(arguments)}")
            ready = prepare(own, argv, held)
    except (absl_flags.Error, UsageError) as e:
        say(f"compare.py: error: {in_flags(str(e))}", sys.stderr)
        return exit_codes.USAGE
    say("\n".join(f"  {line}" for line in ready.plan))
    store = ready.store
    code = Runner(ready.cells, ready.trials, ready.mode, store, ready.out, ready.workers, own.validation_split).run()
    found = store.write()
    page.write(ready.out, found)
    say(page.text(found["table"]))
    say(f"report: {ready.out}/compare.html")
    return code
