"""Say what an update of one of this repository's recipes costs on a TPU slice, without a TPU.

    python -m tools.pod_check --flagfile=flags/recipes/alexnet_bn_32k.flags --topology=v5e:16x16

All flags of train.py are taken, too; without --precision it is mixed_bfloat16, as on a TPU. Exit codes: 0 it fits;
1 it does not; 2 a flag is refused, or the update does not compile.
"""

import argparse
import sys

from lars_keras.pod import PodReport, check
from lars_keras.pod.__main__ import EXIT_DOES_NOT_FIT, EXIT_REFUSED, add_options, print_reports, write
from lars_keras.pod.driver import BACKENDS
from tools.pod_recipe import check_options, read_config, updates_of

NOT_COMPILED = ("telemetry_every", "noise_scale_every")


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.pod_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.set_defaults(backend="both")
    options, rest = parser.parse_known_args(arguments)
    reports: dict[str, PodReport] = {}
    try:
        config = read_config(rest)
        backends = BACKENDS if options.backend == "both" else (options.backend,)
        only_jax = config.shard_optimizer_state or config.reduce_dtype != "float32"
        if only_jax and options.backend == "tensorflow":
            raise ValueError("--shard_optimizer_state and --reduce_dtype are for JAX. Received: --backend=tensorflow")
        if only_jax and options.backend == "both":
            print("tensorflow: left out, --shard_optimizer_state and --reduce_dtype are for JAX")
            backends = ("jax",)
        if measures := [f"--{n}={getattr(config, n)}" for n in NOT_COMPILED if getattr(config, n)]:
            print(f"left out: {' and '.join(measures)}; the check has updates without these measurements")
        print(f"compiling for {options.topology} in {config.precision}, which takes minutes", flush=True)
        for backend in backends:
            reports[backend] = check(
                topology=options.topology, backend=backend, search=not options.one_size, **check_options(config)
            )
    except (ValueError, RuntimeError) as e:
        print(f"pod_check: error: {e}", file=sys.stderr)
        return EXIT_REFUSED
    print_reports(reports)
    for backend, report in reports.items():
        if report.bounds:
            hours = report.bounds.seconds_per_update * updates_of(config) / 3600
            print(f"{backend}: {hours:.2g} hours at best for the {updates_of(config):,} updates of the recipe")
    name = config.model.replace(":", ".")
    out = options.out or f"runs/pod-{name}-{config.batch_size}-{options.topology.replace(':', '-')}.json"
    if not write(reports, out):
        return EXIT_REFUSED
    return 0 if all(report.fits for report in reports.values()) else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
