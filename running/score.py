"""Score a run, for `--eval_only`.

A scoring takes the flags of the run. Only those in `flags.config.FOR_SCORING` may differ.

1. A finished run has `model.keras`, which needs no optimizer. An unfinished run is scored by its newest checkpoint, so
   its model and optimizer are made as for training, without the learning rates.
2. The test split is scored, or the images that the run held out: with `--validation_split`, or without a test split.
3. Data of other classes or shapes than the run's are refused. Other data of the same classes are scored, and the output
   says so.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from flags.config import FOR_SCORING, RunConfig
from lars_keras import data as datasets
from lars_keras.data import ImageData
from lars_keras.files import printable
from lars_keras.report.progress import say
from lars_keras.runtime.errors import UsageError
from lars_keras.runtime.recovery import require_same_checkpoint
from lars_keras.training import Trainer
from lars_keras.training.cluster import Cluster
from running.devices import start_devices
from running.errors import usage_errors
from running.feeds import make_feeds, require_same_data
from running.folder import path_of
from running.model import load_model, make_model, scoring
from running.optimizers import make_optimizer
from running.results import scores_line
from running.resume import RunCheckpoints, config_of_flags, flags_of_run
from running.views import score_views


def score_run(config: RunConfig) -> None:
    """Score the run in `--run_dir`, and print one line.

    Raises:
        UsageError: if the folder holds no run, a flag contradicts the run, or the data do not fit the model.
    """
    notes: list[str] = []
    with usage_errors():
        run_dir = path_of(config.run_dir or "")
        if not ((run_dir / "model.keras").is_file() or any(run_dir.glob("checkpoints/update-*.npz"))):
            raise UsageError(f"--eval_only found no model.keras and no checkpoint in --run_dir={run_dir}")
        unfinished, lines = is_unfinished(run_dir), flags_of_run(str(run_dir))
        trained = config_of_flags(lines) if lines else config
        refuse_other_flags(config, trained, run_dir)

        cluster = start_devices(config)
        facts = _facts(run_dir)
        data, trained_on = _load(config, trained, facts, cluster, notes)
        _refuse_other_classes(facts, data, run_dir)
        with cluster.scope():
            takes = facts.get("image_shape", data.image_shape), facts.get("num_classes", data.num_classes)
            if unfinished or config.is_own_model:
                _refuse_other_shapes(*takes, data, run_dir)
            if unfinished:
                model = make_model(config, trained_on)
                optimizer = _make_optimizer(config, model)
            else:
                model, optimizer = load_model(run_dir, config, trained_on), "sgd"  # which no update uses
                _refuse_other_shapes(model.input_shape[1:], model.output_shape[-1], data, run_dir)
            model.compile(optimizer, **scoring(config, data))
        trainer = Trainer(
            model,
            batch_size=config.batch_size,
            microbatch_size=config.microbatch_size,
            jit_compile=config.compiles,
        )
        train_feed, test_feed = make_feeds(data, trainer, config.seed)
        if unfinished:
            notes.append(f"after update {_restore(config, run_dir, trainer, train_feed)}:")
    if cluster.is_chief and notes:
        say("\n".join(notes))
    with trainer.engine.ema_weights() if unfinished and trainer.engine else contextlib.nullcontext():
        scores = trainer.evaluate(test_feed) | score_views(config, data, trainer, test_feed)
    if cluster.is_chief:
        say(scores_line(scores, data.num_test))


def is_unfinished(path: Path) -> bool:
    """Return True if the newest state of a run is in its checkpoints, not only in `model.keras`.

    The last state is saved before `model.keras`. A run that is extended keeps its old `model.keras` until its new end.
    """
    finished = (path / "results.json").is_file() or not any(path.glob("checkpoints/update-*.npz"))
    return not (finished and (path / "model.keras").is_file())


def refuse_other_flags(config: RunConfig, trained: RunConfig, run_dir: Path) -> None:
    """Refuse flags that would describe another run than the one in the folder, or that have no effect on a scoring.

    Args:
        config: flags of the scoring.
        trained: flags of the run.
        run_dir: folder of the run.

    Raises:
        UsageError: if they differ in a flag that is not in `FOR_SCORING`, or if a part of the training images is to be
            scored that the run did not hold out.
    """
    names = [field.name for field in dataclasses.fields(config) if field.name not in FOR_SCORING]
    if config.validation_split not in (0.0, trained.validation_split):
        names.append("validation_split")
    values = [(name, getattr(config, name), getattr(trained, name)) for name in names]
    if different := [f"--{name}={now} where the run has {then}" for name, now, then in values if now != then]:
        raise UsageError(
            f"--eval_only scores the run in --run_dir={run_dir} with the run's own flags, apart from those of data, "
            f"batch size and devices. Received: {'; '.join(different)}"
        )


def _facts(run_dir: Path) -> dict[str, Any]:
    """Return what the run has saved of its data; nothing if an earlier version wrote it."""
    path = run_dir / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("data", {}) if path.is_file() else {}
    except (ValueError, AttributeError) as e:
        raise UsageError(f"{path} is damaged: {e}") from e


def _load(
    config: RunConfig, trained: RunConfig, facts: dict[str, Any], cluster: Cluster, notes: list[str]
) -> tuple[ImageData, ImageData]:
    """Load the data to score, and with them the data as the run trained on them, without the images it held out.

    The model of an unfinished run normalizes images by the statistics of those that it trains on. They are the saved
    ones, even if the data are not the run's.
    """

    def load(split: float, **changes: Any) -> ImageData:
        options = config.data_options | {"validation_split": split} | changes
        return datasets.load(config.dataset, remote=cluster.remote_input, **options)

    split = config.validation_split
    try:
        data = load(split)
    except FileNotFoundError:  # a folder without val/, or without anything
        if split or not trained.validation_split:
            raise
        split = trained.validation_split
        data = load(split)
        notes.append("There is no test split.")
    require_same_data(cluster, data)
    if split:
        notes.append(f"scored on the {data.num_test:,} images held out by --validation_split={split:g}")
    trained_on = data
    if split != trained.validation_split:
        trained_on = load(trained.validation_split, cache="none" if config.cache == "memory" else config.cache)
    if trained_on.fingerprint != facts.get("fingerprint", trained_on.fingerprint):
        notes.append(
            f"scored on other data than the run's: {trained_on.fingerprint or 'unknown'}; the run has "
            f"{facts['fingerprint'] or 'unknown'}"
        )
    for name in ("mean", "std"):
        setattr(trained_on, name, tuple(facts.get(name, getattr(trained_on, name))))
    return data, trained_on


def _refuse_other_classes(facts: dict[str, Any], data: ImageData, run_dir: Path) -> None:
    """Refuse data whose classes have other names, or another order, than those of the run."""
    names = [data.class_names, tuple(facts.get("class_names", ()))]
    if not all(names) or names[0] == names[1]:
        return
    for number, pair in enumerate(itertools.zip_longest(*names)):
        if pair[0] != pair[1]:
            here, there = (repr(printable(name)) if name is not None else "missing" for name in pair)
            raise UsageError(
                f"--run_dir={run_dir} was trained on other classes: class {number} is {there} there, and {here} in the "
                "data. A file labels.txt in --data_dir can number the classes of a folder of images as the run did."
            )


def _refuse_other_shapes(image_shape: Sequence[int], num_classes: int, data: ImageData, run_dir: Path) -> None:
    """Refuse data whose images or number of classes are not those that the model takes."""
    if (tuple(image_shape), num_classes) != (tuple(data.image_shape), data.num_classes):
        raise UsageError(
            f"The model in --run_dir={run_dir} takes images of {_size(image_shape)} in {num_classes:,} classes. "
            f"Received: images of {_size(data.image_shape)} in {data.num_classes:,} classes"
        )


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _make_optimizer(config: RunConfig, model: keras.Model) -> keras.optimizers.Optimizer:
    """Make the optimizer of the run, for its slots. A schedule of any rates will do; a number would be a variable."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.0, 1, 1.0)
    return make_optimizer(config.optimizer, schedule, model.trainable_variables, **config.optimizer_options)


def _restore(config: RunConfig, run_dir: Path, trainer: Trainer, train_feed: Any) -> int:
    """Restore the newest checkpoint, and return its update.

    Raises:
        UsageError: if there is no undamaged checkpoint.
        ValueError: if it belongs to another model.
    """
    checkpoint = RunCheckpoints(run_dir, config).latest()
    require_same_checkpoint(trainer.cluster, checkpoint)
    if checkpoint is None:
        raise UsageError(f"--eval_only found no model.keras and no checkpoint in --run_dir={run_dir}")
    trainer.restore(checkpoint.arrays, checkpoint.metadata["position"], train_feed)
    return checkpoint.update
