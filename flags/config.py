"""`RunConfig`: each field is a flag, with its default, its bounds and its help in one place."""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

import models
from lars_keras import data, schedules
from lars_keras.exclude import DEFAULT_EXCLUDE
from lars_keras.lars import VARIANTS
from running.optimizers import OPTIMIZERS, SCHEDULES


def _flag(default: Any, kind: str, text: str, affects_result: bool = True, **options: Any) -> Any:
    """A field with its flag; `affects_result` is false where a resumed run may change it."""
    return dataclasses.field(
        default=default, metadata={"kind": kind, "help": text, "affects_result": affects_result, "options": options}
    )


def _choice(default: str | None, values: Sequence[str], text: str, affects_result: bool = True) -> Any:
    return _flag(default, "enum", text, affects_result, enum_values=list(values))


def _whole(default: int | None, text: str, low: int = 1, affects_result: bool = True) -> Any:
    return _flag(default, "integer", text, affects_result, lower_bound=low)


def _real(default: float | None, text: str, high: float | None = None, affects_result: bool = True) -> Any:
    return _flag(default, "float", text, affects_result, lower_bound=0.0, upper_bound=high)


def _text(default: str | None, text: str, affects_result: bool = True) -> Any:
    return _flag(default, "string", text, affects_result)


def _switch(text: str, affects_result: bool = True) -> Any:
    return _flag(False, "bool", text, affects_result)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All flags of a run, validated. A batch size without an adjective is the global one."""

    # What is trained on what.
    model: str = _choice("alexnet_small", models.names(), "Network.")
    dataset: str = _choice("digits", data.NAMES, "Data set.")
    data_dir: str | None = _text(
        None,
        "Folder of the prepared data sets, or for --dataset=folder that of train/CLASS/ and val/CLASS/. Default: that "
        "of tensorflow-datasets.",
        affects_result=False,
    )
    image_size: int | None = _whole(
        None, "Height and width in pixels, for imagenet2012 and folder. Default: the model's.", low=8
    )
    augment: str | None = _choice(
        None,
        data.AUGMENTS,
        "What happens to training images; the last three come after crop_flip. Default: crop_flip; none for digits.",
    )
    validation_split: float = _real(
        0.0,
        "Share of the training images left out of training and scored in place of the test split.",
        high=0.5,
    )
    cache: str = _choice(
        "none", data.CACHES, "Hold the image files in memory, or copies of them in --cache_dir.", affects_result=False
    )
    cache_dir: str | None = _text(None, "Folder of --cache=disk. Default: ~/.cache/lars_keras.", affects_result=False)
    run_dir: str | None = _text(
        None,
        "Folder for all results; an unfinished run in it goes on, with its own flags. Default: runs/<time>-<names>.",
        affects_result=False,
    )
    eval_only: bool = _switch("Score run_dir/model.keras on the test split, and stop.", affects_result=False)
    dry_run: bool = _switch(
        "Show sizes, rehearse two updates on synthetic images, and leave nothing behind.", affects_result=False
    )
    # How long, and in what portions.
    batch_size: int = _whole(8192, "Global batch: examples in an update.")
    microbatch_size: int | None = _whole(
        None, "Examples that a replica takes through the model at once. Default: its share of the batch."
    )
    epochs: float = _real(8.0, "Passes over the training data; may be a fraction.")
    steps: int | None = _whole(None, "Updates; takes the place of --epochs.")
    # The optimizer.
    optimizer: str = _choice("lars", OPTIMIZERS, "Optimizer.")
    learning_rate: float = _real(15.0, "Peak of the learning rate.")
    schedule: str = _choice(
        "polynomial", SCHEDULES, "Decay after the warm-up. step: a tenth from 1/3, 2/3 and 8/9 of the run on."
    )
    power: float = _real(2.0, "Exponent of the polynomial decay.")
    end_learning_rate: float = _real(0.0, "Last rate of a polynomial, cosine or exponential decay.")
    warmup: str | None = _text(
        None,
        "Linear warm-up: epochs, or a duration such as '100 steps' or '1e6 examples'. Default: an epoch, but at most a "
        "fifth of the run.",
    )
    momentum: float = _real(0.9, "Momentum of lars and momentum; beta_1 of lamb and adam.")
    nesterov: bool = _switch("Nesterov momentum, for lars and momentum.")
    weight_decay: float = _real(5e-4, "Weight decay: inside the rule of lars and lamb, decoupled for the others.")
    trust_coefficient: float = _real(1e-3, "eta of LARS.")
    trust_epsilon: float = _real(0.0, "Added to the denominator of LARS's trust ratio.")
    variant: str = _choice("paper", VARIANTS, "Rule of LARS.")
    trust_clip: bool = _switch("The clip of LARC; of lamb, a trust ratio of at most 1.")
    exclude: tuple[str, ...] | None = _flag(
        None,
        "list",
        "Regular expressions of variables that are neither adapted nor decayed. Default: bias and normalisation "
        "variables. Empty: nothing is excluded.",
    )
    excluded_lr_scale: float = _real(0.05, "Factor of lars on the learning rate of variables that are not adapted.")
    global_clipnorm: float | None = _real(None, "Largest norm of all gradients together, of the whole batch.")
    ema_momentum: float | None = _real(
        None, "Momentum of a moving average of the weights, which is what is evaluated and saved.", high=1.0
    )
    label_smoothing: float = _real(0.0, "Share of the label spread over all classes.", high=1.0)
    # Where and how it runs.
    strategy: str = _choice(
        "auto",
        ("auto", "single", "mirrored", "multi_worker", "tpu"),
        "Devices and processes to run on.",
        affects_result=False,
    )
    replicas: int | None = _whole(
        None, "Replicas of --strategy=mirrored; without GPUs, logical CPU devices.", affects_result=False
    )
    tpu: str | None = _text(None, "Name or address of the TPU; 'local' on a TPU VM.", affects_result=False)
    shard_optimizer_state: bool = _switch("On JAX: each device keeps and updates its share of the weights.")
    reduce_dtype: str = _choice("float32", ("float32", "bfloat16"), "On JAX: dtype of gradients between devices.")
    precision: str = _choice("float32", ("float32", "mixed_bfloat16", "mixed_float16"), "Keras dtype policy.")
    sync_batch_norm: bool = _switch("Batch statistics over all replicas, instead of each ghost batch's own.")
    jit_compile: str = _choice("auto", ("auto", "on", "off"), "XLA for the gradients; auto: on GPU and TPU.")
    steps_per_execution: int = _whole(1, "Updates that run without returning to Python.", affects_result=False)
    eval_every: int = _whole(1, "Epochs between evaluations; the end of the run is always evaluated.")
    seed: int = _whole(0, "Seed of weights, order, augmentation and dropout.", low=0)
    telemetry_every: int = _whole(
        0,
        "Updates between log lines with norms, trust ratio and effective rate of every layer; 0: none.",
        0,
        affects_result=False,
    )
    # What a run does when something goes wrong.
    checkpoint_minutes: float = _real(10.0, "Minutes between checkpoints.", affects_result=False)
    checkpoint_updates: int | None = _whole(
        None, "Updates between checkpoints, beside the minutes.", affects_result=False
    )
    keep_checkpoints: int = _whole(3, "How many of the newest checkpoints to keep.", affects_result=False)
    keep_checkpoint_hours: float | None = _real(
        None, "Of the older, keep one for every so many hours.", affects_result=False
    )
    allow_inexact_resume: bool = _switch(
        "Go on with a run although flags differ from those it began with.", affects_result=False
    )
    max_rollbacks: int = _whole(
        3, "How often a run that diverges goes back to its last checkpoint.", 0, affects_result=False
    )
    max_bad_images: int = _whole(100, "How many images that cannot be read are left out.", 0, affects_result=False)

    def __post_init__(self) -> None:
        """Checks what one flag cannot know of another.

        Raises:
            ValueError: names the flags, what was received and what would be accepted.
        """
        if self.microbatch_size and self.batch_size % self.microbatch_size:
            raise ValueError(
                "--microbatch_size must divide --batch_size. "
                f"Received: --microbatch_size={self.microbatch_size} --batch_size={self.batch_size}"
            )
        if self.augment in data.MIXES and (self.microbatch_size or self.batch_size) % 2:
            raise ValueError(
                f"--augment={self.augment} mixes two and two images: the micro-batch must be even. "
                f"Received: --microbatch_size={self.microbatch_size} --batch_size={self.batch_size}"
            )
        if self.cache_dir and self.cache != "disk":
            raise ValueError(f"--cache_dir goes with --cache=disk. Received: --cache={self.cache}")
        if self.steps is None and self.epochs == 0:
            raise ValueError("--epochs must be above 0. Received: --epochs=0")
        if self.eval_only and not self.run_dir:
            raise ValueError("--eval_only needs --run_dir, the folder of the run to score. Received: no --run_dir")
        if self.nesterov and self.variant == "ratio_on_momentum":
            raise ValueError("--variant=ratio_on_momentum has no Nesterov form. Received: --nesterov")
        if self.replicas and self.strategy not in ("auto", "mirrored"):
            raise ValueError(
                f"--replicas goes with --strategy=mirrored. Received: --replicas={self.replicas} "
                f"--strategy={self.strategy}"
            )
        if self.replicas and self.tpu:
            raise ValueError(
                f"--replicas does not go with --tpu. Received: --replicas={self.replicas} --tpu={self.tpu}"
            )
        if self.tpu and self.strategy not in ("auto", "tpu"):
            raise ValueError(f"--tpu goes with --strategy=tpu. Received: --tpu={self.tpu} --strategy={self.strategy}")
        if self.telemetry_every and self.optimizer not in ("lars", "lamb"):
            raise ValueError(
                "--telemetry_every needs trust ratios, so --optimizer=lars or lamb. Received: "
                f"--telemetry_every={self.telemetry_every} --optimizer={self.optimizer}"
            )
        if self.momentum >= 1.0:
            raise ValueError(f"--momentum must be below 1. Received: --momentum={self.momentum}")
        if self.schedule == "polynomial" and self.power == 0.0:
            raise ValueError("--power must be above 0. Received: --power=0")
        if self.schedule == "exponential" and not (self.end_learning_rate and self.learning_rate):
            raise ValueError(
                "--schedule=exponential needs --learning_rate and --end_learning_rate above 0. Received: "
                f"--learning_rate={self.learning_rate:g} --end_learning_rate={self.end_learning_rate:g}"
            )
        try:
            schedules.duration_in_updates(self.warmup_duration, batch_size=1, num_examples=1)
        except ValueError as e:
            raise ValueError(f"--warmup: {e}") from None

    @property
    def warmup_duration(self) -> str:
        """`warmup` with its unit; one epoch where there is none."""
        text = self.warmup or "1"
        try:
            float(text)
        except ValueError:
            return text
        return f"{text} epochs"

    @property
    def excluded(self) -> tuple[str, ...]:
        """The patterns of `exclude`."""
        return DEFAULT_EXCLUDE if self.exclude is None else self.exclude

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Arguments of `lars_keras.training.make_optimizer` beside the rate."""
        shared = ("momentum", "nesterov", "weight_decay", "global_clipnorm")
        ema = {} if self.ema_momentum is None else {"use_ema": True, "ema_momentum": self.ema_momentum}
        own = ("trust_coefficient", "variant", "trust_clip", "excluded_lr_scale")
        values = {name: getattr(self, name) for name in shared + own}
        return {"exclude": self.excluded, "epsilon": self.trust_epsilon, **ema, **values}

    def total_updates(self, num_train: int) -> int:
        """Updates of the whole run."""
        return self.steps or max(1, math.ceil(self.epochs * num_train / self.batch_size - 1e-9))

    def warmup_updates(self, num_train: int) -> int:
        """Updates of the warm-up."""
        updates = schedules.duration_in_updates(
            self.warmup_duration, batch_size=self.batch_size, num_examples=num_train
        )
        return updates if self.warmup else min(updates, self.total_updates(num_train) // 5)

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """What makes this run another than the one whose fields were `before`, a phrase each."""
        found = []
        for field in dataclasses.fields(self):
            now, then = getattr(self, field.name), before.get(field.name, field.default)
            then = tuple(then) if isinstance(then, list) else then
            if now != then and field.metadata["affects_result"]:
                found.append(f"--{field.name}={now} was {then}")
        return found

    def as_flags(self) -> str:
        """The flagfile that repeats the run: one line for each flag that has a value."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or field.name in ("run_dir", "eval_only", "dry_run", "allow_inexact_resume"):
                continue
            if isinstance(value, tuple):
                value = _as_csv(value)
            lines.append(f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}")
        return "\n".join(lines) + "\n"


def _as_csv(values: Sequence[str]) -> str:
    """A line that `absl` reads as a list again: what has a comma is quoted."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def define() -> flags.FlagValues:
    """All flags, with their defaults, apart from absl's global ones."""
    values = flags.FlagValues()
    for field in dataclasses.fields(RunConfig):
        make = getattr(flags, f"DEFINE_{field.metadata['kind']}")
        text, options = field.metadata["help"], field.metadata["options"]
        make(field.name, field.default, help=text, flag_values=values, **options)
    flags.DEFINE_bool("help", False, "Show all flags.", short_name="h", flag_values=values)
    return values


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """The flags in `argv`, on top of those of the run that is in `--run_dir`, and the arguments that are no flags.

    Raises:
        absl.flags.Error: for a flag that is unknown or out of range.
    """
    values = define()
    try:
        arguments = values(argv)
    except (UnicodeDecodeError, OSError) as e:
        raise flags.Error(f"--flagfile is not a readable text file: {e}") from e
    own = Path(values["run_dir"].value or "") / "flags.txt"
    if values["run_dir"].value and own.is_file():
        values = define()
        arguments = values([argv[0], f"--flagfile={own}", *argv[1:]])
    return values, arguments[1:]


def read(values: flags.FlagValues) -> RunConfig:
    """The parsed flags as a `RunConfig`.

    Raises:
        ValueError: if flags contradict each other.
    """
    settings: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(RunConfig)}
    if settings["exclude"] is not None:
        settings["exclude"] = tuple(settings["exclude"])
    return RunConfig(**settings)
