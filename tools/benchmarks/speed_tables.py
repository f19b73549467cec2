"""Tables of docs/results.md on speed and memory."""

from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def optimizer_part(found: dict[str, Any]) -> str:
    """Return the tables of `tools.benchmarks.optimizer_step`."""
    flags = f"XLA_FLAGS={found['xla_flags']} " if found["xla_flags"] else ""
    flags += "KERAS_BACKEND=jax " if found["backend"] == "jax" else ""
    command = f"{flags}python -m tools.benchmarks.optimizer_step"
    if found.get("updates", 1) > 1:  # on a GPU, where not all was timed
        networks, dtypes = map(dict.fromkeys, zip(*(title.split(", ") for title in found["results"]), strict=True))
        command += f" --networks={','.join(networks)} --dtypes={','.join(dtypes)} --updates={found['updates']}"
    text = f"`{command}`, {found['machine']}, medians of {found['rounds']} rounds.\n"
    for title, result in found["results"].items():
        rows = [
            [
                row["name"],
                row["mode"],
                f"{row['milliseconds']:.1f}" if found["backend"] == "tensorflow" else f"{row['milliseconds']:.2f}",
                f"{row['times_sgd']:.2f}",
                f"{row['milliseconds'] / row['floor_milliseconds']:.2f}",
                "-" if row["extra_share_of_weights"] is None else f"{100 * row['extra_share_of_weights']:.1f} %",
            ]
            for row in sorted(result["rows"], key=lambda row: row["milliseconds"])
        ]
        head = ["optimizer", "mode", "ms", "x SGD (XLA)", "x bandwidth bound", "extra memory / weights"]
        text += (
            f"\n{title}, {result['parameters'] / 1e6:.1f}M parameters; memory {result['bandwidth'] / 1e9:.1f} GB/s\n\n"
        )
        text += table(head, rows)
    return text


def growth_part(found: dict[str, Any]) -> str:
    """Return the table of `tools.benchmarks.growth`."""
    rows = [
        [result["axis"], ", ".join(f"{r['size']:,}: {r['ms']:.1f}" for r in result["rows"]), f"{result['slope']:.2f}"]
        for result in found["results"].values()
    ]
    return (
        "![milliseconds of an update over its size](growth.svg)\n\n"
        "Milliseconds of an update at each size. The slope is taken over the last three points in logarithms: 1 means "
        f"that the cost doubles with the size. `python -m tools.benchmarks.growth --rounds={found['rounds']} "
        f"--most={found['results']['parameters']['rows'][-1]['size']}`, {found['machine']}.\n\n"
        + table(["over", "ms", "slope"], rows)
    )


def training_step_part(found: dict[str, Any]) -> str:
    """Return the table of `tools.benchmarks.training_step` on a CPU."""
    return (
        "Whole training steps in images per second. The last column is the median over the rounds of the ratio to "
        "Keras `fit` in the same mode, or in graph mode if it has no such mode; the ratio of two medians may differ. "
        "Keras `fit` was up to twice as fast in one run as in another, so these ratios are rough. "
        'Graph mode beats XLA on this CPU for both networks, and `jit_compile="auto"` uses it. '
        "`python -m tools.benchmarks.training_step --networks=NAME --batch=128 "
        f"--rounds={found['rows'][0]['rounds']}`, {found['machine']}.\n\n" + _training_steps(found)
    )


def _training_steps(found: dict[str, Any]) -> str:
    rows = [
        [
            f"`{row['network']}`, {row['size']} pixels, batch {row['batch']}",
            f"{row['name']}, {row['mode']}",
            row["dtype"],
            f"{row['images_per_second']:,.0f}",
            f"{row['of_keras_fit']:.2f}",
        ]
        for row in found["rows"]
    ]
    return table(["network", "trained by", "dtype", "images/s", "x Keras `fit`"], rows)


def gpu_part(update: dict[str, Any], step: dict[str, Any], host: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return what was measured on a GPU."""
    (chain,) = host["rows"]
    shown = ("seed", "microbatch_size", "excluded_lr_scale", "validation_split", "updates")
    rows = [[*(f"{run[name]:g}" for name in shown), *_scores(run), f"{run['minutes']:.2f}"] for run in runs]
    head = ["seed", "micro-batch", "`excluded_lr_scale`", "held out", "updates", "top-1", "of six views", "minutes"]
    return (
        f"On JAX, on {update['machine']}. `train.py`, and TensorFlow, were not run there.\n\n"
        "### An update on a GPU\n\n" + optimizer_part(update) + "\n### A training step on a GPU\n\n"
        "Measured at commit 2f501c0. `Trainer` took as long with AlexNet in float32 as in bfloat16, so arithmetic was "
        "not its bound. It then copied each batch of 39 MB twice on the host, to fresh memory. This is "
        "[fixed](#the-feed). It was not timed on a GPU again. PyTorch trains with SGD and momentum, the others with "
        f"LARS. `XLA_FLAGS={step['xla_flags']} KERAS_BACKEND=jax python -m tools.benchmarks.training_step "
        "--networks=NAME --batch=256`: `--dtypes=bfloat16 --steps=10 --rounds=4` for ResNet-50, "
        "`--steps=20 --rounds=5` for AlexNet.\n\n"
        + _training_steps(step)
        + "\nThe host's own work for an update of a chain of 160 Dense layers: "
        f"{chain['Trainer, ms']:.1f} ms, Keras `fit` {chain['Keras fit, ms']:.1f} ms (`{host['command']}`).\n\n"
        "### The fast network at 1,024 on a GPU\n\n"
        "The settings of `cifar10_fast_1k` but for those in the table. The first run had the GPU for itself, and the "
        "other five shared it. Minutes include compilation. `KERAS_BACKEND=jax python -m "
        "tools.benchmarks.cifar10_arrays --flagfile=flags/recipes/cifar10_fast_1k.flags --images=FILE`.\n\n"
        + table(head, rows)
    )


def _scores(run: dict[str, Any]) -> list[str]:
    return [f"{100 * run[name]:.2f} %" for name in ("top1", "top1_views")]


def feed_part(found: dict[str, Any]) -> str:
    """Return the table of `tools.benchmarks.feed`."""
    before = found["before"]
    rows = [
        [when, *cells] for when, held in ((f"at {before['commit']}", before), ("now", found)) for cells in _feeds(held)
    ]
    return (
        "Milliseconds of an update whose model reads one pixel of each image: the time that a batch takes to "
        f"reach the device. A call of `fit` takes 40 updates. `{found['command']}`, {found['machine']}, medians of "
        f"{found['rounds']} rounds. The benchmark was copied to commit {before['commit']}.\n\n"
        + table(["", "backend", "data", "MB of a batch", "`Trainer`", "Keras `fit`", "median of paired ratios"], rows)
    )


def _feeds(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            row["backend"],
            row["form"],
            f"{row['megabytes']:.1f}",
            *(f"{row[name]:.1f}" for name in ("Trainer, ms", "Keras fit, ms")),
            f"{row['ratio']:.2f}",
        ]
        for row in found["rows"]
    ]


def host_time_part(found: dict[str, Any]) -> str:
    """Return the table of `tools.benchmarks.host_time`."""
    rows = [
        [
            row["backend"],
            row["model"],
            *(f"{row[name]:.1f}" for name in ("Trainer, ms", "Keras fit, ms")),
            f"{row['ratio']:.2f}",
        ]
        for row in found["rows"]
    ]
    return (
        "Milliseconds of an update whose arithmetic costs next to nothing, one update a call: the host's own work. "
        f"`{found['command']}`, {found['machine']}.\n\n"
        + table(["backend", "model", "`Trainer`", "Keras `fit`", "median of paired ratios"], rows)
    )


def input_part(found: dict[str, Any]) -> str:
    """Return the tables of `tools.benchmarks.input_pipeline`."""
    settings, versions = found["settings"], found["versions"]
    text = (
        f"Real ImageNet JPEGs to {settings['size']} pixels, {versions['machine']}, {versions['cores']} cores, "
        f"medians of {settings['rounds']} rounds. `ms` is processor time for an image; the last two columns "
        "are ratios of images/s, then of processor time, in the same round. "
        "`python -m tools.benchmarks.input_pipeline`. Pillow and Grain take the files from memory.\n"
    )
    for kind, candidates in found["results"].items():
        rows = [
            [
                name,
                f"{row['images_per_second']:,.0f}",
                f"{row['ms']:.2f}",
                *(f"{speed:.2f}; {busy:.2f}" for speed, busy in row["of"].values()),
            ]
            for name, row in candidates.items()
        ]
        references = next(iter(candidates.values()))["of"]
        text += "\n" + table([kind, "images/s", "ms", *(f"x {name}" for name in references)], rows)
    text += (
        "\nFFCV publishes 172,801 images/s from raw images of 256 pixels, and 31,278 from JPEGs of 512 pixels and "
        "quality 90, in memory, to random resized crops of 224 pixels (its docs/benchmarks.rst, an AWS p3dn.24xlarge "
        "with 96 virtual cores). FFCV itself: not run.\n"
    )
    return text


def before_after_part(found: dict[str, Any]) -> str:
    """Return the table of the same work at an earlier commit and at a later one."""
    rows = []
    for row in found["rows"]:
        form = ("{:.1f}" if row["unit"] == "ms" else "{:.2f}" if row["unit"][0] == "x" else "{:,.0f}").format
        gain = row["after"] / row["before"] if row["unit"] == "images/s" else row["before"] / row["after"]
        bound = f"{row['after'] / row['bound']:.2f}" if "bound" in row else "-"
        cells = (form(row[key]) for key in ("before", "after", "beside"))
        rows.append([row["work"], row["unit"], *cells, row["beside_name"], f"{gain:.2f}", bound, f"`{row['command']}`"])
    head = ["work", "unit", "before", "after", "beside it", "which is", "gain", "x bandwidth bound", "command"]
    return (
        f"The same work at commit {found['before']} and at {found['after']}, in turn, on one machine: "
        f"{found['machine']}, medians of {found['rounds']} rounds. Benchmarks that the earlier commit does not "
        'have were copied to it. "Beside it" is from the runs of the later commit.\n\n' + table(head, rows)
    )
