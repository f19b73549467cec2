"""`RunConfig`: each field is a flag of `train.py`, with its default, its bounds and its help in one place."""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import models
from lars_keras import data, schedules
from lars_keras.exclude import DEFAULT_EXCLUDE
from lars_keras.lars import VARIANTS
from running.optimizers import OPTIMIZER_FLAGS, OPTIMIZERS, SCHEDULE_FLAGS, SCHEDULES, applies

NOT_REPEATED = ("run_dir", "eval_only", "dry_run", "allow_inexact_resume")  # belong to a command, not to a run
FOR_SCORING = (  # say which images --eval_only scores, where they are, and on which devices
    *("run_dir", "eval_only", "dataset", "data_dir", "image_size", "augment", "resized", "validation_split"),
    *("cache", "cache_dir", "batch_size", "microbatch_size", "test_views"),
    *("strategy", "replicas", "tpu", "shard_optimizer_state", "jit_compile"),
)


def _flag(default: Any, kind: str, text: str, affects_result: bool = True, **options: Any) -> Any:
    """Define a field with its flag; `affects_result` is false if a resumed run may change it."""
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


def _switch(text: str, default: bool = False, affects_result: bool = True) -> Any:
    return _flag(default, "bool", text, affects_result)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Holds all flags of a run, validated. "Batch size" without an adjective means the global batch size.

    Raises:
        ValueError: if flags contradict each other; the message names the flags, and what would be accepted.
    """

    model: str = _text(
        "alexnet_small",
        f"Train this network: {', '.join(models.names())}; or yours, as package.module:function, which is called "
        "with the shape of an image and the number of classes.",
    )
    dataset: str = _choice("digits", data.NAMES, "Train on this data set.")
    data_dir: str | None = _text(
        None,
        "Read prepared data sets from this folder, or train/CLASS/ and val/CLASS/ with --dataset=folder. Default: the "
        "folder of tensorflow-datasets.",
        affects_result=False,
    )
    image_size: int | None = _whole(
        None, "Resize imagenet2012 and folder to this height and width in pixels. Default: the model's.", low=8
    )
    augment: str | None = _choice(
        None,
        data.AUGMENTS,
        "Augment training images. crop_mirror takes a window of images stored at one size; alternating_flip shifts by "
        "2 pixels and flips in every second epoch, for cifar10; randaugment, mixup and cutmix also crop and flip. "
        "Default: crop_flip; none for digits.",
    )
    resized: str | None = _text(
        None,
        "Read images that prepare --resize has stored in this form, such as crop256; for imagenet2012 and folder.",
    )
    validation_split: float = _real(
        0.0, "Hold out this fraction of the training images, and score it instead of the test split.", high=0.5
    )
    cache: str = _choice(
        "none", data.CACHES, "Hold the image files in memory, or copy them to --cache_dir.", affects_result=False
    )
    cache_dir: str | None = _text(
        None, "Keep the copies of --cache=disk in this folder. Default: ~/.cache/lars_keras.", affects_result=False
    )
    run_dir: str | None = _text(
        None,
        "Write all results to this folder, or resume the unfinished run in it with its own flags. Default: "
        "runs/<time>-<names>.",
        affects_result=False,
    )
    eval_only: bool = _switch(
        "Score the run in --run_dir, by its newest checkpoint if it is unfinished, and stop. It scores the test split; "
        "with --validation_split, or if there is no test split, the images that the run held out. Only flags of data, "
        "batch size and devices may differ from those of the run.",
        affects_result=False,
    )
    dry_run: bool = _switch(
        "Show sizes, rehearse two updates on synthetic images, and write no run folder.", affects_result=False
    )
    batch_size: int = _whole(8192, "Use this many examples in an update: the global batch size.")
    microbatch_size: int | None = _whole(
        None,
        "Take this many examples through the model at once on each replica. Default: the replica's part of the batch.",
    )
    epochs: float = _real(8.0, "Train for this many epochs; may be a fraction.")
    steps: int | None = _whole(None, "Train for this many updates, in place of --epochs.")
    optimizer: str = _choice("lars", OPTIMIZERS, "Train with this optimizer.")
    learning_rate: float = _real(15.0, "Set the peak of the learning rate.")
    schedule: str = _choice(
        "polynomial",
        SCHEDULES,
        "Decay the learning rate after the warm-up; step multiplies by 0.1 at 1/3, 2/3 and 8/9 of the run.",
    )
    power: float = _real(2.0, "Set the exponent of the polynomial decay.")
    end_learning_rate: float = _real(0.0, "End a polynomial, cosine or exponential decay at this rate.")
    end_lr_scale: float | None = _real(
        None, "End the decay at this fraction of the peak, in place of --end_learning_rate.", high=1.0
    )
    initial_lr_scale: float = _real(0.0, "Begin the warm-up at this fraction of the peak.", high=1.0)
    warmup: str | None = _text(
        None,
        "Warm up linearly for this many epochs, or for a duration such as '100 steps' or '1e6 examples'. Default: one "
        "epoch, but at most a fifth of the run.",
    )
    momentum: float = _real(0.9, "Set the momentum of lars and momentum, and beta_1 of lamb and adam.")
    nesterov: bool = _switch("Use Nesterov momentum; for lars and momentum.")
    weight_decay: float = _real(5e-4, "Decay weights: inside the rule of lars and lamb, decoupled for the others.")
    beta_2: float = _real(0.999, "Set the decay rate of the second moment of lamb and adam.")
    adam_epsilon: float | None = _real(
        None, "Add this to the root of the second moment of lamb and adam. Default: 1e-6 for lamb, 1e-7 for adam."
    )
    bias_correction: bool = _switch("Correct the bias of the moments of lamb.", default=True)
    trust_coefficient: float = _real(1e-3, "Set the trust coefficient of lars, eta in the paper.")
    trust_epsilon: float = _real(0.0, "Add this to the denominator of the trust ratio of lars.")
    variant: str = _choice("paper", VARIANTS, "Use this rule of lars; see docs/optimizers.md.")
    trust_clip: bool = _switch("Clip the trust ratio: as LARC for lars, at 1 for lamb.")
    exclude: tuple[str, ...] | None = _flag(
        None,
        "list",
        "Neither adapt nor decay variables that match these regular expressions. Default: bias and normalization "
        "variables. Empty: exclude nothing.",
    )
    excluded_lr_scale: float = _real(0.05, "Multiply the rate of lars by this for variables that are not adapted.")
    bias_lr_scale: float = _real(
        1.0, "Multiply the rate of sgd and momentum by this for the variables of --exclude, such as biases."
    )
    global_clipnorm: float | None = _real(None, "Clip the global norm of the whole batch's gradients to this value.")
    ema_momentum: float | None = _real(
        None, "Keep an EMA of the weights with this momentum, and evaluate and save the EMA.", high=1.0
    )
    ema_overwrite_every: int | None = _whole(
        None, "Put the EMA back into the weights every N updates, much as Lookahead does."
    )
    test_views: int = _flag(
        1,
        "integer",
        "Also score the trained model on 2 views of each image (plain and flipped), or on 6 (with shifted copies). The "
        "plain score is reported either way.",
        affects_result=False,
        lower_bound=1,
        upper_bound=6,
    )
    label_smoothing: float = _real(0.0, "Spread this fraction of the label over all classes.", high=1.0)
    strategy: str = _choice(
        "auto",
        ("auto", "single", "mirrored", "multi_worker", "tpu"),
        "Run on one device (single), all devices of this host (mirrored), several hosts (multi_worker), or a TPU; auto "
        "takes --tpu, else the hosts of TF_CONFIG, else all devices of this host.",
        affects_result=False,
    )
    replicas: int | None = _whole(
        None, "Use this many replicas of --strategy=mirrored; without GPUs, logical CPU devices.", affects_result=False
    )
    tpu: str | None = _text(
        None, "Connect to the TPU of this name or address; 'local' on a TPU VM.", affects_result=False
    )
    shard_optimizer_state: bool = _switch("Keep and update a shard of weights and slots on each device; JAX only.")
    reduce_dtype: str = _choice(
        "float32", ("float32", "bfloat16"), "Send gradients between devices in this dtype; bfloat16 on JAX only."
    )
    precision: str = _choice("float32", ("float32", "mixed_bfloat16", "mixed_float16"), "Set the Keras dtype policy.")
    sync_batch_norm: bool = _switch("Take batch statistics over all replicas, not over each ghost batch.")
    jit_compile: str = _choice(
        "auto", ("auto", "on", "off"), "Compile gradients with XLA; auto: on GPU and TPU. JAX always compiles."
    )
    steps_per_execution: int = _whole(1, "Run this many updates without returning to Python.", affects_result=False)
    eval_every: int = _whole(1, "Evaluate every N epochs, and at the end of the run.", affects_result=False)
    seed: int = _whole(0, "Seed weights, order, augmentation and dropout.", low=0)
    telemetry_every: int = _whole(
        0,
        "Log norms, trust ratio and effective learning rate of every variable every N updates; 0: never.",
        0,
        affects_result=False,
    )
    noise_scale_every: int = _whole(
        0,
        "Estimate the gradient noise scale every N updates, at least 2; 0: never. An update must have several ghost "
        "batches.",
        0,
        affects_result=False,
    )
    checkpoint_minutes: float = _real(
        10.0, "Save a checkpoint every X minutes; 1e9: only the first and the last state.", affects_result=False
    )
    checkpoint_updates: int | None = _whole(None, "Save a checkpoint every N updates, too.", affects_result=False)
    keep_checkpoints: int = _whole(3, "Keep this many of the newest checkpoints.", affects_result=False)
    keep_checkpoint_hours: float | None = _real(
        None, "Also keep one older checkpoint for every X hours.", affects_result=False
    )
    allow_inexact_resume: bool = _switch(
        "Resume a run even if flags differ from those it was started with.", affects_result=False
    )
    max_rollbacks: int = _whole(
        3, "Roll a diverged run back to its last checkpoint at most N times.", 0, affects_result=False
    )
    max_unreadable_images: int = _whole(
        100, "Abort after more than this many unreadable images.", 0, affects_result=False
    )

    def __post_init__(self) -> None:
        """Check flags against each other."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):  # absl takes nan, whatever the bounds
                raise ValueError(f"--{field.name} must be finite. Received: --{field.name}={value}")
        if self.model not in models.names() and not self.is_own_model:
            raise ValueError(
                f"--model must be one of {', '.join(models.names())}, or package.module:function. Received: "
                f"--model={self.model}"
            )
        if self.is_own_model and self.sync_batch_norm:
            raise ValueError(
                "--sync_batch_norm is for the networks of this project. Synchronize your own layers yourself. "
                f"Received: --sync_batch_norm --model={self.model}"
            )
        if self.is_own_model and self.dataset in data.ANY_SIZE and self.image_size is None:
            raise ValueError(
                "--image_size is needed for a model of your own. Received: "
                f"--model={self.model} --dataset={self.dataset}"
            )
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
            raise ValueError(f"--cache_dir needs --cache=disk. Received: --cache={self.cache}")
        if self.steps is None and self.epochs == 0:
            raise ValueError("--epochs must be above 0. Received: --epochs=0")
        if self.eval_only and not self.run_dir:
            raise ValueError("--eval_only needs --run_dir, the folder of the run to score. Received: no --run_dir")
        if self.eval_only and self.dry_run:
            raise ValueError("--dry_run rehearses a training, and --eval_only has none. Received: both")
        if self.optimizer == "lars" and self.nesterov and self.variant == "ratio_on_momentum":
            raise ValueError("--variant=ratio_on_momentum does not support Nesterov momentum. Received: --nesterov")
        if self.replicas and self.strategy not in ("auto", "mirrored"):
            raise ValueError(
                f"--replicas needs --strategy=mirrored. Received: --replicas={self.replicas} --strategy={self.strategy}"
            )
        if self.replicas and self.tpu:
            raise ValueError(
                f"--replicas cannot be combined with --tpu. Received: --replicas={self.replicas} --tpu={self.tpu}"
            )
        if self.tpu and self.strategy not in ("auto", "tpu"):
            raise ValueError(f"--tpu needs --strategy=tpu. Received: --tpu={self.tpu} --strategy={self.strategy}")
        if self.ema_overwrite_every and self.ema_momentum is None:
            raise ValueError(
                "--ema_overwrite_every needs --ema_momentum. "
                f"Received: --ema_overwrite_every={self.ema_overwrite_every}"
            )
        if self.noise_scale_every == 1:
            raise ValueError("--noise_scale_every must be 0 or at least 2. Received: --noise_scale_every=1")
        if self.telemetry_every and self.optimizer not in ("lars", "lamb"):
            raise ValueError(
                "--telemetry_every needs trust ratios, so --optimizer=lars or lamb. Received: "
                f"--telemetry_every={self.telemetry_every} --optimizer={self.optimizer}"
            )
        for name in ("momentum", "beta_2"):
            if getattr(self, name) >= 1.0:
                raise ValueError(f"--{name} must be below 1. Received: --{name}={getattr(self, name)}")
        if self.schedule == "polynomial" and self.power == 0.0:
            raise ValueError("--power must be above 0. Received: --power=0")
        if self.test_views not in models.VIEWS:
            accepted = ", ".join(map(str, models.VIEWS))
            raise ValueError(f"--test_views must be one of {accepted}. Received: --test_views={self.test_views}")
        if self.end_lr_scale is not None and self.end_learning_rate:
            raise ValueError(
                "--end_lr_scale takes the place of --end_learning_rate: give one. Received: "
                f"--end_lr_scale={self.end_lr_scale:g} --end_learning_rate={self.end_learning_rate:g}"
            )
        if self.schedule == "exponential" and not (self._schedule_options["end"] and self.learning_rate):
            raise ValueError(
                "--schedule=exponential needs --learning_rate and --end_learning_rate above 0. Received: "
                f"--learning_rate={self.learning_rate:g} --end_learning_rate={self._schedule_options['end']:g}"
            )
        try:
            schedules.duration_in_updates(self.warmup_duration, batch_size=1, num_examples=1)
        except ValueError as e:
            raise ValueError(f"--warmup: {e}") from None

    @property
    def warmup_duration(self) -> str:
        """`warmup` with its unit; one epoch if it is not set."""
        text = self.warmup or "1"
        try:
            float(text)
        except ValueError:
            return text
        return f"{text} epochs"

    @property
    def is_own_model(self) -> bool:
        """True if `model` names a function of the user's."""
        return ":" in self.model

    @property
    def input_size(self) -> int | None:
        """Height and width of the images; None for a data set with a size of its own."""
        if self.dataset in data.ANY_SIZE and self.image_size is None:
            return models.default_image_size(self.model)
        return self.image_size

    @property
    def compiles(self) -> bool | str:
        """Return the argument `jit_compile` of `Trainer`."""
        return "auto" if self.jit_compile == "auto" else self.jit_compile == "on"

    @property
    def data_options(self) -> dict[str, Any]:
        """Arguments of `lars_keras.data.load` besides the name."""
        same = ("data_dir", "augment", "resized", "cache", "cache_dir", "validation_split")
        return {"image_size": self.input_size, **{name: getattr(self, name) for name in same}}

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Arguments of `running.optimizers.make_optimizer` besides name, rate and variables."""
        shared = {"weight_decay": self.weight_decay, "global_clipnorm": self.global_clipnorm}
        ema: dict[str, Any] = {}
        if self.ema_momentum is not None:
            ema = {
                "use_ema": True,
                "ema_momentum": self.ema_momentum,
                "ema_overwrite_frequency": self.ema_overwrite_every,
            }
        exclude = DEFAULT_EXCLUDE if self.exclude is None else self.exclude
        own = self._arguments(OPTIMIZER_FLAGS, self.optimizer)
        return {"exclude": exclude, **{k: v for k, v in (shared | ema | own).items() if v is not None}}

    def schedule_arguments(self, num_train: int) -> dict[str, Any]:
        """Arguments of `running.optimizers.make_schedule`."""
        durations = {"warmup_updates": self.warmup_updates(num_train), "total_updates": self.total_updates(num_train)}
        return {"name": self.schedule, "peak": self.learning_rate, **durations, **self._schedule_options}

    @property
    def _schedule_options(self) -> dict[str, Any]:
        options = self._arguments(SCHEDULE_FLAGS, self.schedule)
        end_scale = options.pop("end_scale", None)
        if end_scale is not None:
            options["end"] = end_scale * self.learning_rate
        return {**options, "start": self.initial_lr_scale * self.learning_rate}

    def _arguments(self, table: dict[str, dict[str, str]], owner: str) -> dict[str, Any]:
        return {arguments[owner]: getattr(self, flag) for flag, arguments in table.items() if owner in arguments}

    def total_updates(self, num_train: int) -> int:
        """Return the updates of the whole run."""
        return self.steps or max(1, math.ceil(self.epochs * num_train / self.batch_size - 1e-9))

    def warmup_updates(self, num_train: int) -> int:
        """Return the updates of the warm-up.

        Raises:
            ValueError: if the run is not longer than its warm-up.
        """
        total = self.total_updates(num_train)
        updates = schedules.duration_in_updates(
            self.warmup_duration, batch_size=self.batch_size, num_examples=num_train
        )
        if not self.warmup:
            return min(updates, total // 5)
        if updates >= total and self.schedule != "step":
            raise ValueError(
                f"--warmup must be shorter than the run of {total} updates. Received: --warmup={self.warmup}, "
                f"{updates} updates"
            )
        return updates

    def applies(self, flag: str) -> bool:
        """Return whether a flag has a meaning for the optimizer and the schedule of this run."""
        return applies(flag, self.optimizer, self.schedule)

    def as_flags(self) -> str:
        """Return the flagfile that repeats the run: one line for each flag that has a value and a meaning."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or field.name in NOT_REPEATED or not self.applies(field.name):
                continue
            if isinstance(value, tuple):
                value = _as_csv(value)
            lines.append(f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}")
        return "\n".join(lines) + "\n"


def _as_csv(values: Sequence[str]) -> str:
    """Return a line that `absl` reads as a list again: values with a comma are quoted."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()
