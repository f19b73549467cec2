"""Phrases of the README whose figures come from results/*.json, each figure bound to its cell.

A phrase is an f-string: words as they stand in the document, and a call that reads one cell in place of each figure.
`test_results.py` demands that each phrase stands in its document once, and that no figure stands outside of a phrase.
So a number changed in the document or in the JSON fails.

To quote a new figure: write the sentence, then add the phrase here with as few words as say what the figure is, and
the cell. Line breaks do not matter. A figure that is no measurement of ours goes into `UNBOUND`, with its words.
"""

from tools.benchmarks import results
from tools.comparison.page import score

# Document: words around figures that are settings, versions or other people's results.
UNBOUND = {
    "README.md": (
        "Python 3.11 to 3.13 and make",
        "`.venv` in the checkout (3.1 GB)",
        "(Python 3.11 to 3.13)",
        "| 58.7, 58.5, 58.2, 55.0, 46.9 % | LARS paper",
        "| 60.2, 60.4, 60.1, 59.3, 57.8 % | LARS paper",
        "| 10, 17, 21.2, 24.7 | 42, 44, 57, 86 | 75.9 % (target) | MLPerf reference points",
        "held-out digits, of which one is 0.22 %",
        "The bytes that must be moved ask for 1.4 (LARS) and 2 (LAMB)",
        "for 1.5 (BUILD-notes.md)",
        "a random window (8 to 100 % of the area)",
    )
}


def update(network: str, optimizer: str, mode: str, dtype: str = "float32") -> str:
    """Return the time of one update in units of Keras SGD+momentum compiled by XLA."""
    rows = results.read("optimizer_step")["results"][f"{network}, {dtype}"]["rows"]
    (row,) = (row for row in rows if (row["name"], row["mode"]) == (optimizer, mode))
    return f"{row['times_sgd']:.2f}"


def updates(optimizer: str, mode: str, dtype: str = "float32") -> str:
    """Return the times on both networks, as in `1.75 and 1.59`."""
    return f"{update('alexnet', optimizer, mode, dtype)} and {update('resnet50', optimizer, mode, dtype)}"


def training_step(key: str) -> str:
    """Return a ratio of `optimizer_training_step.json`."""
    return f"{results.read('optimizer_training_step')['results']['training step of alexnet_bn'][key]:.3f}"


def fed(pipeline: str) -> str:
    """Return the speed of a training pipeline over the decoder and resize alone, by processor time."""
    return f"{results.read('input_pipeline')['results']['training'][pipeline]['of_decoder_and_resize_by_ms']:.2f}"


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
    """Return the validation score of the chosen rate of a cell, as in `89.88 %`."""
    row = cell(comparison, candidate, batch_size)
    (found,) = (tried["top1"] for tried in row["tuning"] if tried["rate"] == row["rate"])
    return f"{100 * found:.2f} %"


def table(comparison: str, candidates: tuple[str, ...], batch_sizes: tuple[int, ...]) -> str:
    """Return a table of top-1: batch sizes down, candidates across."""
    rows = [["batch", *candidates], ["---"] * (1 + len(candidates))]
    rows += [[f"{b:,}", *(top1(comparison, c, b) for c in candidates)] for b in batch_sizes]
    return " ".join("| " + " | ".join(row) + " |" for row in rows)


def phrases() -> dict[str, list[str]]:
    """Return the bound phrases by document."""
    optimizers = ("lars", "lamb", "sgd", "momentum", "adam")
    both = [
        f"{mean('cifar10', 'lars', b)} and {mean('cifar10', 'momentum', b)} % at {b:,}"
        for b in (1024, 4096, 8192, 16384)
    ]
    questions = [("questions", name, 8192) for name in ("demo", "demo_geometric", "demo_true_batch")]
    demo, geometric, true_batch = (top1(*question) for question in questions)
    tuned, tuned_geometric, tuned_true_batch = (validation(*question) for question in questions)
    return {
        "README.md": [
            f"LARS {updates('LARS (ours)', 'xla')}, LAMB {updates('LAMB (ours)', 'xla')}",
            f"`optax.lars` {updates('optax.lars', 'jit')}, Keras Lamb {updates('Keras Lamb', 'xla')}",
            f"LARS {updates('LARS (ours)', 'graph')}, Keras SGD+momentum {updates('Keras SGD+momentum', 'graph')}",
            f"bfloat16: LARS {updates('LARS (ours)', 'xla', 'bfloat16')}, "
            f"LAMB {updates('LAMB (ours)', 'xla', 'bfloat16')}, "
            f"`optax.lars` {updates('optax.lars', 'jit', 'bfloat16')}",
            f"at batch 64: {training_step('lars_over_sgd')} times that with Keras SGD+momentum",
            f"telemetry of every update {training_step('telemetry_over_none')} times",
            table("digits", optimizers, (64, 1024, 8192)),
            f"LARS {mean('cifar10', 'lars', 256)} %, momentum {mean('cifar10', 'momentum', 256)} % at 256",
            *both,
            f"scores {geometric} instead of {demo}",
            f"512 at a time {true_batch}",
            f"polynomial decay had {tuned}, geometric {tuned_geometric}, true batches {tuned_true_batch}",
            f"{fed('lars_keras')} of the speed of TensorFlow's decoder and resize",
            f"as in tutorials, at {fed('tutorial: tfds, whole image, resize')}",
        ]
    }
