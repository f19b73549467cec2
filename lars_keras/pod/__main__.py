"""Tell the cost of a training step of your own Keras model on a TPU slice, by the real compiler, without a TPU.

`make_model` names a function without arguments that returns a compiled Keras model. The arrays of a batch are
DTYPE:SIZE,SIZE,... of one example, such as uint8:224,224,3 or int32. Exit codes: 0 the step fits; 1 it does not; 2 an
argument or a model is refused, or the step does not compile.
"""

import argparse
import json
import sys
from pathlib import Path

from lars_keras.pod.chips import Chip
from lars_keras.pod.driver import BACKENDS, check
from lars_keras.pod.report import PodReport

EXIT_DOES_NOT_FIT = 1
EXIT_REFUSED = 2

DIFFERENCES = """Where the backends differ:
  TensorFlow's runtime puts the all-reduce between the programs, so its bytes here are computed; those of JAX are read
  from the compiled program. Both reduce once per update. Each device has its own batch statistics on both. With
  synchronized batch normalization TensorFlow reduces them at run time, JAX in the program. Shards of the weights
  (`shard_optimizer_state`) are for JAX only."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every pod check: topology, backends, and the file of the answer."""
    parser.add_argument("--topology", required=True, help="chip and shape of the slice, such as v5e:8x8")
    parser.add_argument("--backend", choices=(*BACKENDS, "both"), default="jax", help="Keras backend of the step")
    parser.add_argument("--one_size", action="store_true", help="skip the largest micro-batch: half the time")
    parser.add_argument("--out", help="JSON file for the figures")


def print_reports(reports: dict[str, PodReport]) -> None:
    """Print the reports of each backend, and the figures behind them."""
    for backend, report in reports.items():
        print(f"\n{backend}\n{report}")
    if len(reports) > 1:
        print(f"\n{DIFFERENCES}")
    chip = next(iter(reports.values())).chip
    print(f"\nChip: {chip_line(chip)}\nCompiled, not run: bounds at the chip's peaks, without overheads or input.")


def chip_line(chip: Chip) -> str:
    """Return the published figures of a chip as a sentence."""
    return (
        f"{chip.flops / 1e12:.0f} TFLOP/s bfloat16, {chip.hbm_bytes / 2**30:.0f} GiB at "
        f"{chip.hbm_bandwidth / 1e9:.0f} GB/s, links {chip.ici_bandwidth / 1e9:.0f} GB/s out. Source: {chip.source}."
    )


def write(reports: dict[str, PodReport], path: str) -> bool:
    """Write the reports as JSON, one line per backend. Say where, or why not; return whether it was possible."""
    lines = [f"{json.dumps(backend)}: {json.dumps(report.to_dict())}" for backend, report in reports.items()]
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    except OSError as e:
        print(f"The figures cannot be written to {path}: {e}", file=sys.stderr)
        return False
    print(f"written to {path}")
    return True


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lars_keras.pod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("make_model", help="package.module:function")
    parser.add_argument("--x", help="input of the model")
    parser.add_argument("--y", help="labels")
    parser.add_argument("--sample_weight", help="weights of the examples, such as float32")
    parser.add_argument(
        "--batch_spec", help="package.module:function that returns (x, y) or (x, y, sample_weight), in place of these"
    )
    parser.add_argument("--batch_size", type=int, required=True, help="global batch")
    parser.add_argument("--microbatch_size", type=int, help="examples that a device takes at once")
    parser.add_argument("--shard_optimizer_state", action="store_true", help="keep the weights in shards; JAX only")
    parser.add_argument("--reduce_dtype", default="float32", help="of the gradients between devices; JAX only")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        arrays = [options.x, options.y, options.sample_weight]
        if bool(options.batch_spec) == any(arrays) or not (options.batch_spec or all(arrays[:2])):
            raise ValueError("The batch must be given either by `x` and `y`, or by `batch_spec`.")
        print(f"compiling for {options.topology}, which takes minutes", flush=True)
        reports = {
            backend: check(
                options.make_model,
                options.batch_spec or tuple(array for array in arrays if array),
                topology=options.topology,
                batch_size=options.batch_size,
                microbatch_size=options.microbatch_size,
                backend=backend,
                shard_optimizer_state=options.shard_optimizer_state,
                reduce_dtype=options.reduce_dtype,
                search=not options.one_size,
            )
            for backend in (BACKENDS if options.backend == "both" else (options.backend,))
        }
    except (ValueError, RuntimeError) as e:
        print(f"lars_keras.pod: error: {e}", file=sys.stderr)
        if isinstance(e, RuntimeError):
            print(*getattr(e, "__notes__", []), sep="\n", file=sys.stderr)
        return EXIT_REFUSED
    print_reports(reports)
    if options.out and not write(reports, options.out):
        return EXIT_REFUSED
    return 0 if all(report.fits for report in reports.values()) else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
