"""Phrases of the README whose figures come from results/*.json, each figure bound to its cell.

A phrase is an f-string: words as they stand in the document, and a call that reads one cell in place of each figure.
`test_results.py` demands that each phrase stands in its document once, and that no figure stands outside of a phrase.
So a number changed in the document or in the JSON fails.

To quote a new figure: write the sentence, then add the phrase here with as few words as say what the figure is, and
the cell. Line breaks do not matter. A figure that is no measurement of ours goes into `UNBOUND`, with its words.
"""

import collections
import json
import math
import statistics

from tools.benchmarks import results
from tools.comparison.page import score

# Document: words around figures that are settings, versions or other people's results.
UNBOUND = {
    "README.md": (
        "Python 3.11 to 3.13, make",
        "installs 1.4 GB, the second makes it 2.8 GB.",
        "Keras must be 3.10 or later",
        "the noise scale with 95 % confidence bands",
    ),
    "docs/api.md": (),
    "docs/cifar10.py": (
        "A learning rate of 0.05 is good",
        "A learning rate of 0.1 is better",
        "a layer by 2 % of the layer's norm",
        "With momentum 0.9, an update moves it by at most 20 %",
    ),
    "docs/choosing.md": (
        "the source reports 94 % of six views, with SGD",
        "without batch normalization: 58.2 % against 44.8 % at 8K",
    ),
    "docs/data.md": ("crops a random window of 8 to 100 % of the area",),
    "docs/devices.md": ("`tensorflow-tpu` 2.20.0 is its last release", "H100 with JAX 0.11.2, `Trainer`"),
    "docs/hosts.md": (),
    "docs/migrating.md": (),
    "docs/noise_scale.md": ("at batch 512 each example contributes 60 % as much progress",),  # the form of the sentence
    "docs/optimizers.md": (),
    "docs/recipes.md": (
        "| 58.7, 58.5, 58.2, 55.0, 46.9 % | LARS paper",
        "| 60.2, 60.4, 60.1, 59.3, 57.8 % | LARS paper",
        "| 10, 17, 21.2, 24.7 | 42, 44, 57, 86 | 75.9 % (target) | MLPerf reference points",
    ),
    "docs/quickstart.py": ("need a factor of 0.05",),
    "docs/running.md": (),
    "docs/tpu.py": (),
    "docs/trainer.md": (),
}


def update(network: str, optimizer: str, mode: str, dtype: str = "float32") -> str:
    """Return the time of one update in units of Keras SGD+momentum compiled by XLA."""
    rows = results.read("optimizer_step")["results"][f"{network}, {dtype}"]["rows"]
    (row,) = (row for row in rows if (row["name"], row["mode"]) == (optimizer, mode))
    return f"{row['times_sgd']:.2f}"


def updates(words: str, optimizer: str, mode: str) -> str:
    """Return a row of the table of speeds, AlexNet then ResNet-50."""
    return f"| {words} | {update('alexnet', optimizer, mode)} | {update('resnet50', optimizer, mode)} |"


def on_gpu(optimizer: str, key: str = "milliseconds") -> float:
    """Return the time of one update of AlexNet on a GPU, or another key of its row."""
    rows = results.read("optimizer_step_gpu")["results"]["alexnet, float32"]["rows"]
    (found,) = (row[key] for row in rows if row["name"] == optimizer)
    return found


def times_bound(optimizer: str) -> str:
    """Return the time of one update of AlexNet on a GPU in units of its bandwidth bound."""
    return f"{on_gpu(optimizer) / on_gpu(optimizer, 'floor_milliseconds'):.2f}"


def gpu_step(network: str) -> str:
    """Return the speed of `Trainer` on a GPU in units of Keras `fit`, lowest and highest, as in `0.36 to 0.55`."""
    rows = results.read("training_step_gpu")["rows"]
    found = [row["of_keras_fit"] for row in rows if (row["network"], row["name"]) == (network, "Trainer")]
    return " to ".join(f"{ratio:.2f}" for ratio in sorted(found))


def training_step(key: str) -> str:
    """Return a ratio of `optimizer_training_step.json`."""
    return f"{results.read('optimizer_training_step')['results']['training step of alexnet_bn'][key]:.3f}"


def cell(comparison: str, candidate: str, batch_size: int) -> dict:
    """Return a row of the table of a comparison."""
    rows = results.read(f"compare_{comparison}")["table"]
    (row,) = (row for row in rows if (row["candidate"], row["batch_size"]) == (candidate, batch_size))
    return row


def top1(comparison: str, candidate: str, batch_size: int) -> str:
    """Return mean and standard deviation of a cell, as in `88.07 ± 3.76 %`."""
    return score(cell(comparison, candidate, batch_size))


def mean(comparison: str, candidate: str, batch_size: int) -> str:
    """Return the mean of a cell, without the sign of percent."""
    return f"{100 * cell(comparison, candidate, batch_size)['mean']:.2f}"


def validation(comparison: str, candidate: str, batch_size: int) -> str:
    """Return the validation score of the chosen rate of a cell, without the sign of percent."""
    row = cell(comparison, candidate, batch_size)
    *_, found = (tried["top1"] for tried in row["tuning"] if tried["rate"] == row["rate"])
    return f"{100 * found:.2f}"


def lost(optimizer: str) -> str:
    """Return how many points an optimizer loses on the digits from batch 64 to 1,024."""
    return f"{float(mean('digits', optimizer, 64)) - float(mean('digits', optimizer, 1024)):.2f}"


def at_edge(*comparisons: str) -> str:
    """Return the number of cells whose chosen rate is the lowest or highest that was tried, as in `5 of the 15`."""
    rows = [row for name in comparisons for row in results.read(f"compare_{name}")["table"]]
    return f"{sum(row['at_edge'] for row in rows)} of the {len(rows)}"


def table(comparison: str, candidates: tuple[str, ...], batch_sizes: tuple[int, ...]) -> str:
    """Return a table of top-1: batch sizes down, candidates across."""
    rows = [["batch", *candidates], ["---"] * (1 + len(candidates))]
    rows += [[f"{b:,}", *(top1(comparison, c, b) for c in candidates)] for b in batch_sizes]
    return " ".join("| " + " | ".join(row) + " |" for row in rows)


def all_fast_runs() -> list[dict]:
    """Return the full fast network's finished runs, scored on the test split."""
    runs = [json.loads(line) for line in (results.RESULTS / "cifar10_fast.jsonl").read_text().splitlines()]
    return [run for run in runs if run["model"] == "fast_cifar" and run["finished"] and run["scored_on"] == "test"]


SETTINGS = (
    "learning_rate",
    "epochs",
    "weight_decay",
    "momentum",
    "bias_lr_scale",
    "excluded_lr_scale",
    "ema_overwrite_every",
    "precision",
)


def fast_runs() -> list[dict]:
    """Return the runs of `all_fast_runs` at the best settings of each cell."""
    cells = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in all_fast_runs():
        cells[run["batch_size"], run["optimizer"]][tuple(run.get(name) for name in SETTINGS)].append(run)
    return [run for settings in cells.values() for run in max(settings.values(), key=_mean_top1)]


def _mean_top1(runs: list[dict]) -> float:
    return statistics.fmean(run["top1"] for run in runs)


def fast_top1(optimizer: str, batch_size: int) -> str:
    """Return the top-1 of the full fast network, mean and standard deviation of its seeds."""
    found = [run["top1"] for run in fast_runs() if (run["optimizer"], run["batch_size"]) == (optimizer, batch_size)]
    return score({"diverged": 0, "top1": found})


def fast_run(name: str, key: str = "top1") -> str:
    """Return a score of one run of any fast network."""
    runs = [json.loads(line) for line in (results.RESULTS / "cifar10_fast.jsonl").read_text().splitlines()]
    (found,) = [run[key] for run in runs if run["run"] == name and run["finished"]]
    return score({"diverged": 0, "top1": [found]})


def fast_seed(optimizer: str, batch_size: int, seed: int) -> str:
    """Return the top-1 of one run of the full fast network."""
    wanted = optimizer, batch_size, seed
    (found,) = [run["top1"] for run in fast_runs() if (run["optimizer"], run["batch_size"], run["seed"]) == wanted]
    return score({"diverged": 0, "top1": [found]})


def momentum_table() -> str:
    """Return a table of the rates that were tried for momentum 0.9 on the full fast network."""
    tried = collections.defaultdict(list)
    for run in all_fast_runs():
        if run["optimizer"] == "momentum" and run["momentum"] == 0.9:
            found = score({"diverged": 0, "top1": [run["top1"]]})
            tried[run["batch_size"], run["epochs"]].append((run["learning_rate"], f"{run['learning_rate']:g}: {found}"))
    rows = [["batch", "epochs", "peak learning rate: top-1"], ["---"] * 3]
    for (batch_size, epochs), cells in sorted(tried.items()):
        rows.append([f"{batch_size:,}", f"{epochs:g}", ", ".join(text for _, text in sorted(cells))])
    return " ".join("| " + " | ".join(row) + " |" for row in rows)


TRIES = {
    "none: rate 20": "f1k-b",
    "rate 14": "f1k-r14-s0",
    "rate 26": "f1k-r26-s0",
    "rate 26, an EMA put back every 5 updates (`--ema_momentum=0.6 --ema_overwrite_every=5`)": "f1k-look",
    "biases at the raw rate, not 4 times it (`--excluded_lr_scale=1`)": "f1k-ex1",
    "GELU for the rectifiers, as in the source": "g1k-s0",
    "GELU, and twice the weight decay": "g1k-wd1e3-s0",
    "float32 for bfloat16": "f1k-f32",
}


def tries_table() -> str:
    """Return a table of changes to the recipe of LARS at 1,024."""
    rows = [["change", "top-1", "of six views"], ["---"] * 3]
    rows += [[words, fast_run(name), fast_run(name, "top1_views")] for words, name in TRIES.items()]
    return " ".join("| " + " | ".join(row) + " |" for row in rows)


def fast_gap(batch_size: int) -> str:
    """Return how many points of top-1 momentum is behind LARS on the full fast network."""
    lars, momentum = (float(fast_top1(name, batch_size).split()[0]) for name in ("lars", "momentum"))
    return f"{lars - momentum:.2f}"


def fast_loss(batch_size: int) -> str:
    """Return how many points of top-1 LARS loses on the full fast network against batch 1,024."""
    small, large = (float(fast_top1("lars", size).split()[0]) for size in (1024, batch_size))
    return f"{small - large:.2f}"


def fast_table() -> str:
    """Return a table of the full fast network's finished runs: a row for each optimizer and batch size."""
    runs = fast_runs()
    rows = [["optimizer", "batch", "epochs", "updates", "seeds", "top-1", "top-1 of six views"], ["---"] * 7]
    for batch_size, optimizer in sorted({(run["batch_size"], run["optimizer"]) for run in runs}):
        same = [run for run in runs if (run["batch_size"], run["optimizer"]) == (batch_size, optimizer)]
        ((epochs, updates),) = {(f"{run['epochs']:g}", run["updates"]) for run in same}
        found = {"diverged": 0} | {key: [run[key] for run in same] for key in ("top1", "top1_views")}
        scores = (score(found, key) for key in ("top1", "top1_views"))
        rows.append([optimizer, f"{batch_size:,}", epochs, f"{updates:,}", str(len(same)), *scores])
    return " ".join("| " + " | ".join(row) + " |" for row in rows)


def equal_epochs_table() -> str:
    """Return a table of the narrow fast network: four optimizers, and what pytorch-lars reports at these batches."""
    others = {(row["candidate"], row["batch_size"]): row for row in results.read("compare_cifar10_fast_lamb")["table"]}
    rows = [["batch", "updates", "lars", "momentum", "lamb", "adam", "pytorch-lars reports"], ["---"] * 7]
    for batch_size in sorted({row["batch_size"] for row in results.read("compare_cifar10_fast")["table"]}):
        updates = f"{cell('cifar10_fast', 'lars', batch_size)['updates']:,}"
        scores = [top1("cifar10_fast", name, batch_size) for name in ("lars", "momentum")]
        scores += [score(others[key]) if (key := (name, batch_size)) in others else "-" for name in ("lamb", "adam")]
        rows.append([f"{batch_size:,}", updates, *scores, f"{results.PYTORCH_LARS[batch_size]:.2f} %"])
    return " ".join("| " + " | ".join(row) + " |" for row in rows)


def rates(comparison: str, candidate: str) -> str:
    """Return the chosen rates over the batch sizes, as in `26, 23 and 35`."""
    table = results.read(f"compare_{comparison}")["table"]
    *first, last = (f"{row['rate']:.2g}" for row in table if row["candidate"] == candidate)
    return f"{', '.join(first)} and {last}"


def spread_of_rates(comparison: str, candidate: str, least: int = 0) -> str:
    """Return the largest of the chosen rates over the smallest, at batches of at least `least`."""
    table = results.read(f"compare_{comparison}")["table"]
    found = [row["rate"] for row in table if row["candidate"] == candidate and row["batch_size"] >= least]
    return f"{max(found) / min(found):.1f}"


def steps_of_search(*comparisons: str) -> str:
    """Return the factors between a chosen rate and the next that was tried, as in `1.3 to 3`."""
    factors = []
    for row in (row for name in comparisons for row in results.read(f"compare_{name}")["table"]):
        tried = sorted({run["rate"] for run in row["tuning"]})
        factors += [b / a for a, b in zip(tried, tried[1:], strict=False) if row["rate"] in (a, b)]
    return f"{min(factors):.2g} to {max(factors):.2g}"


def halfway(comparison: str) -> str:
    """Return the noise scale halfway through a run."""
    (run,) = (run for run in results.read("noise_scale")["runs"] if run["comparison"] == comparison)
    return f"{run['parts'][len(run['parts']) // 2 - 1]['noise_scale']:,.0f}"


def points(comparison: str, better: tuple[str, int], worse: tuple[str, int]) -> str:
    """Return how many points of top-1 one cell is ahead of another."""
    ahead, behind = (float(mean(comparison, *cell)) for cell in (better, worse))
    return f"{ahead - behind:.2f}"


def lamb_ahead(batch_size: int) -> str:
    """Return how many points LAMB is ahead of LARS, on the narrow fast network."""
    ahead, behind = (
        float(mean(f"cifar10_fast{part}", name, batch_size)) for part, name in (("_lamb", "lamb"), ("", "lars"))
    )
    return f"{ahead - behind:.2f}"


def lost_at_1k(optimizer: str) -> str:
    """Return how many points an optimizer loses from batch 256 to 1,024 with the small AlexNet."""
    return points("systemds_cifar10", (optimizer, 256), (optimizer, 1024))


def efficiency(comparison: str, batch_size: int) -> str:
    """Return the efficiency of an example by the noise scale halfway, in percent."""
    return f"{100 / (1 + batch_size / float(halfway(comparison).replace(',', ''))):.0f} %"


def times_noise_scale(comparison: str, batch_size: int) -> str:
    """Return a batch size in units of the noise scale halfway, as in `35 times`."""
    return f"{batch_size / float(halfway(comparison).replace(',', '')):.0f} times"


def settings(*recipes: str) -> dict[str, str]:
    """Return batch sizes, rates and epochs of flagfiles, as in `20, 40`."""
    found = []
    for name in recipes:
        lines = (results.RESULTS.parent / "flags" / "recipes" / f"{name}.flags").read_text().splitlines()
        found.append(dict(line.removeprefix("--").split("=", 1) for line in lines if "=" in line and line[0] == "-"))
    for flags in found:
        flags["batch_size"] = f"{int(flags['batch_size']):,}"
    return {name: ", ".join(flags[name] for flags in found) for name in ("batch_size", "learning_rate", "epochs")}


def stored(form: str) -> str:
    """Return how much faster batches of stored images come than batches from full-size files."""
    row = results.read("input_pipeline")["results"]["stored at 256 x 256"][f"lars_keras, --resized={form}"]
    return f"{row['of']['lars_keras, full size'][0]:.2f}"


def per_core(name: str) -> int:
    """Return the images per second of one core, from full-size files or stored images."""
    found = results.read("input_pipeline")
    part = found["results"]["stored at 256 x 256"]
    return round(part[f"lars_keras, {name}"]["images_per_second"] / found["versions"]["cores"])


def cores_for_gpu(name: str) -> int:
    """Return the cores that feed the `Trainer` on a GPU, for ResNet-50."""
    return math.ceil(gpu_images() / per_core(name))


def gpu_images() -> float:
    """Return the images per second of `Trainer` on a GPU, for ResNet-50."""
    rows = results.read("training_step_gpu")["rows"]
    (found,) = (r["images_per_second"] for r in rows if (r["network"], r["name"]) == ("resnet50", "Trainer"))
    return found


def phrases() -> dict[str, list[str]]:
    """Return the bound phrases by document."""
    optimizers = ("lars", "lamb", "sgd", "momentum", "adam")
    questions = [("questions", name, 8192) for name in ("demo", "demo_geometric", "demo_true_batch")]
    demo, geometric, true_batch = (top1(*question) for question in questions)
    tuned, tuned_geometric, tuned_true_batch = (validation(*question) for question in questions)
    return {
        "README.md": [
            f"{fast_loss(8192)} points at 8,192 and {fast_loss(16384)} points at 16,384",
            f"momentum loses {lost_at_1k('momentum')} points from 256 to 1,024, LARS {lost_at_1k('lars')}",
            f"is {fast_gap(1024)} points behind LARS at 1,024, {fast_gap(4096)} at 4,096 and {fast_gap(16384)} at",
            fast_table(),
            equal_epochs_table(),
        ],
        "docs/choosing.md": [
            f"Momentum loses {lost('momentum')} points, Adam {lost('adam')} and SGD {lost('sgd')}",
            f"In {at_edge('cifar10_fast', 'cifar10_fast_lamb')} cells, momentum at 256",
            f"In {at_edge('digits')} cells",
            table("systemds_cifar10", ("lars", "momentum", "adam", "sgd"), (256, 1024, 4096, 8192)),
            f"At 1,024 LARS loses {lost_at_1k('lars')} points, momentum {lost_at_1k('momentum')}, "
            f"Adam {lost_at_1k('adam')} and SGD {lost_at_1k('sgd')}. At 4,096",
            f"LARS is {points('systemds_cifar10', ('lars', 4096), ('momentum', 4096))} and "
            f"{points('systemds_cifar10', ('lars', 8192), ('momentum', 8192))} points ahead of momentum there",
            f"best rates of LARS span a factor of {spread_of_rates('systemds_cifar10', 'lars')}, those of momentum "
            f"{spread_of_rates('systemds_cifar10', 'momentum')}, of Adam {spread_of_rates('systemds_cifar10', 'adam')} "
            f"and of SGD {spread_of_rates('systemds_cifar10', 'sgd')}",
            table("digits", optimizers, (64, 1024, 8192)),
            equal_epochs_table(),
            f"are LARS {rates('cifar10_fast', 'lars')}, momentum {rates('cifar10_fast', 'momentum')}",
            f"From 256 to 16,384 they span a factor of {spread_of_rates('cifar10_fast', 'lars', 256)} for LARS, "
            f"{spread_of_rates('cifar10_fast', 'momentum', 256)} for momentum, "
            f"{spread_of_rates('cifar10_fast_lamb', 'lamb')} for LAMB and "
            f"{spread_of_rates('cifar10_fast_lamb', 'adam')} for Adam; from 64 on, "
            f"{spread_of_rates('cifar10_fast', 'lars')} for LARS and "
            f"{spread_of_rates('cifar10_fast', 'momentum')} for momentum",
            f"lie a factor of {steps_of_search('cifar10_fast', 'cifar10_fast_lamb')} apart",
            f"LAMB of LARS: by {lamb_ahead(4096)} points at 4,096 and {lamb_ahead(16384)} at 16,384",
            f"LAMB {rates('cifar10_fast_lamb', 'lamb')}, and Adam {rates('cifar10_fast_lamb', 'adam')}",
            f"reaches {fast_top1('lars', 4096)} at batch 4,096 after 32 epochs, and {fast_top1('lars', 1024)} at 1,024",
            f"it loses {fast_loss(8192)} points, and at 16,384 after 59 epochs {fast_loss(16384)} points",
            f"by {fast_gap(1024)} points at 1,024, {fast_gap(4096)} at 4,096 and {fast_gap(16384)} at 16,384",
            momentum_table(),
            f"without its Lookahead and GELU: {fast_run('m1k-b64-r15')}",
            f"it reached {fast_run('m1k-b64-r15-gelu')}, and {fast_run('m1k-b64-r15-gelu', 'top1_views')} of six views",
            tries_table(),
            f"At 16,384, 40 epochs reach {fast_run('f16k-e40')}",
            f"polynomial decay {demo}, geometric decay {geometric}",
            f"ghost batches of 512 {true_batch}",
            f"they have {tuned}, {tuned_geometric} and {tuned_true_batch} %",
        ],
        "docs/cifar10.py": [table("cifar10", ("lars", "momentum"), (256, 1024, 4096, 8192, 16384))],
        "docs/data.md": [
            f"| files of full size | {per_core('full size'):,} |",
            f"| `--resized=squash256` | {per_core('--resized=squash256'):,} |",
            f"| `--resized=squash256_raw` | {per_core('--resized=squash256_raw'):,} |",
            f"`Trainer` took {gpu_images():,.0f} images/s on ResNet-50",
            f"that is {cores_for_gpu('full size')} cores for files of full size, and "
            f"{cores_for_gpu('--resized=squash256')} for squash256",
            f"are read {stored('squash256')} times as fast as from full-size files, and those of raw pixels "
            f"{stored('squash256_raw')} times",
        ],
        "docs/devices.md": [
            f"at {gpu_step('resnet50')} times the speed of Keras `fit` on ResNet-50, and at {gpu_step('alexnet_bn')} "
            "times on",
        ],
        "docs/noise_scale.md": [
            f"digits: noise scale {halfway('digits')} halfway",
            f"batch 1,024, where an example contributes {efficiency('digits', 1024)}",
            f"8,192, where it contributes {efficiency('digits', 8192)}, LARS falls to {top1('digits', 'lars', 8192)}",
            f"`cifar10_fast_4k` at seed 0 reached {fast_seed('lars', 4096, 0)}",
            f"with these settings reached {fast_top1('lars', 8192)}",
            f"a warm-up of 11.8 epochs or 37 updates, reached {fast_top1('lars', 16384)}",
            f"small AlexNet: noise scale {halfway('cifar10')} halfway",
            f"4,096: noise scale {halfway('cifar10_fast_4k')} halfway, where an example contributes "
            f"{efficiency('cifar10_fast_4k', 4096)}",
            f"the digits at {times_noise_scale('digits', 8192)}, CIFAR-10 at {times_noise_scale('cifar10', 4096)}",
            f"256 to 1,024, where an example contributes {efficiency('cifar10', 1024)}, top-1 falls from "
            f"{mean('cifar10', 'lars', 256)} % to {mean('cifar10', 'lars', 1024)} %",
        ],
        "docs/recipes.md": [
            "| {batch_size} | {learning_rate} | {epochs} |".format(
                **settings("cifar10_fast_1k_momentum", "cifar10_fast_4k_momentum", "cifar10_fast_16k_momentum")
            ),
            "| {batch_size} | {learning_rate} | {epochs} |".format(
                **settings(*(f"cifar10_fast_{size}" for size in ("1k", "4k", "8k", "16k")))
            ),
        ],
        "docs/running.md": [f"Runs were killed {sum(cell['kills'] for cell in results.read('resume'))} times"],
        "docs/optimizers.md": [
            updates("LARS", "LARS (ours)", "xla"),
            updates("LAMB", "LAMB (ours)", "xla"),
            updates("`optax.lars`", "optax.lars", "jit"),
            updates("Keras `Lamb`", "Keras Lamb", "xla"),
            f"batch 64 takes {training_step('lars_over_sgd')} times",
            f"takes {times_bound('LARS (ours)')} times its bandwidth bound with LARS, "
            f"and {times_bound('LAMB (ours)')} times with LAMB",
            f"`optax.lars` takes {on_gpu('optax.lars') / on_gpu('LARS (ours)'):.2f} times as long as LARS",
        ],
    }
