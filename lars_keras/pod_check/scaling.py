"""Compiles the JAX update of two networks for slices of growing size: the figures of docs/scaling.md.

    KERAS_BACKEND=jax python -m lars_keras.pod_check.scaling --out=docs/pod_scaling.json

Takes about half an hour on two cores. Each point is written as soon as it is compiled, and a file that is there is
completed. `--plot=FILE` draws it.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

# Batch, chips: the largest slice first, then those whose programs differ from it.
POINTS = [
    *((batch, chips) for chips in (256, 1, 16, 64) for batch in (32768, 8192, 16384)),
]
RECIPES = {"alexnet_bn": "flags/alexnet_bn_{}.flags", "resnet50": "flags/resnet50_{}.flags"}
TOPOLOGIES = {1: "v5e:1x1", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}


def config_of(model: str, batch: int) -> Any:
    """The flags of a point: the recipe of the nearest batch, in bfloat16, with the update in shares."""
    import flags

    recipe = {8192: "8k", 16384: "16k", 32768: "32k"}[batch]
    path = RECIPES[model].format(recipe)
    if not Path(path).exists():
        path = RECIPES[model].format("32k")
    values, _ = flags.parse(
        ["", f"--flagfile={path}", f"--batch_size={batch}", "--precision=mixed_bfloat16", "--shard_update"]
    )
    return flags.read(values)


def point(model: str, batch: int, chips: int, known: dict[Any, Any]) -> dict[str, Any] | None:
    """Compiles one point; None where it would only be another size of a pass that is not compiled yet."""
    from lars_keras.pod_check.chips import chip_of
    from lars_keras.pod_check.programs import devices_of, jax_programs, model_of
    from lars_keras.pod_check.roofline import roofline
    from lars_keras.training.trainer import split_batch

    config = config_of(model, batch)
    chip, devices = chip_of(TOPOLOGIES[chips]), devices_of(TOPOLOGIES[chips])
    size, k = split_batch(batch, len(devices), config.microbatch_size)
    programs = jax_programs(config, devices, size, k, known.get((model, size)))
    if k > 1:
        known[model, size] = programs[1]
    updates = config.total_updates(model_of(config)[1].num_train)
    return {
        "model": model,
        "batch": batch,
        "chips": chips,
        "topology": TOPOLOGIES[chips],
        "microbatch_size": size,
        "microbatches": k,
        "programs": [dataclasses.asdict(p) for p in programs],
        "memory": max(p.memory for p in programs),
        "roofline": roofline(programs, chip, 1, batch, updates),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/pod_scaling.json")
    parser.add_argument("--plot", help="draw the points of --out into this file, and stop")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    found = json.loads(out.read_text()) if out.exists() else {"points": []}
    if options.plot:
        from lars_keras.pod_check.scaling_plot import draw

        draw(found["points"], options.plot)
        return 0
    from lars_keras.pod_check.__main__ import _versions

    known: dict[Any, Any] = {}
    done = {(p["model"], p["batch"], p["chips"]) for p in found["points"]}
    for batch, chips in POINTS:
        for model in RECIPES:
            if (model, batch, chips) in done:
                continue
            new = point(model, batch, chips, known)
            if new:
                found["points"].append(new)
                best = new["roofline"]
                print(
                    f"{model} {batch} on {chips}: {new['memory'] / 2**20:,.0f} MiB, {best['bound']} bound, "
                    f"{1e3 * best['seconds_per_update']:.2f} ms",
                    flush=True,
                )
            found["versions"] = _versions()
            out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    from lars_keras.pod_check.__main__ import _COMPILE_ONLY

    os.environ.update(_COMPILE_ONLY)
    sys.exit(main(sys.argv[1:]))
