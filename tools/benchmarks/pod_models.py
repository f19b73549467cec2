"""Check models of other projects for slices of v5e: the table of docs/pod.md.

    KERAS_BACKEND=jax python -m tools.benchmarks.pod_models --out=results/pod_models.json

Three networks of keras.applications, and the Vision Transformer of keras-hub, which no extra of this package installs.
Each point is written as soon as it is compiled, and a file that is there is completed. Prints the table of docs/pod.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from lars_keras import LAMB, LARS
from tools.committed import write_json

BATCH_SIZE = 8192
TOPOLOGIES = {64: "v5e:8x8", 8: "v5e:2x4", 1: "v5e:1x1"}
IMAGES = ("float32:224,224,3", "int32")


def resnet50() -> keras.Model:
    """Make ResNet-50 with LARS."""
    return _compiled(keras.applications.ResNet50(weights=None, classifier_activation=None), LARS(10.0))


def efficientnet_b0() -> keras.Model:
    """Make EfficientNet-B0 with LARS."""
    return _compiled(keras.applications.EfficientNetB0(weights=None, classifier_activation=None), LARS(10.0))


def convnext_tiny() -> keras.Model:
    """Make ConvNeXt-Tiny with LAMB."""
    return _compiled(keras.applications.ConvNeXtTiny(weights=None, classifier_activation=None), LAMB(4e-3))


def vit_s16() -> keras.Model:
    """Make ViT-S/16 of keras-hub with LAMB."""
    import keras_hub  # pip install keras-hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=16,
        num_layers=12,
        num_heads=6,
        hidden_dim=384,
        mlp_dim=1536,
    )
    head = keras.layers.Dense(1000, dtype="float32")
    return _compiled(keras.Model(backbone.inputs, head(backbone.outputs[0][:, 0])), LAMB(4e-3))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "resnet50": resnet50,
    "efficientnet_b0": efficientnet_b0,
    "vit_s16": vit_s16,
    "convnext_tiny": convnext_tiny,
}


def _compiled(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="top1")])
    return model


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/pod_models.json", help="JSON file to complete")
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--microbatch_size", type=int, default=128, help="examples of a micro-batch")
    parser.add_argument("--table_only", action="store_true", help="compile nothing")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"points": []}
    if not options.table_only:
        for name in options.models.split(","):
            for point in _points(name, options.microbatch_size, found["points"]):
                found["points"].append(point)
                found["points"].sort(key=lambda p: (list(MODELS).index(p["model"]), p["chips"]))
                write_json(out, found)
    print(table(found["points"]))
    return 0


def _points(name: str, size: int, known: list[dict[str, Any]]) -> Any:
    """Compile the missing points of a model; the program of a micro-batch is the same on any number of chips."""
    from lars_keras.pod.batch import parse_batch
    from lars_keras.pod.chips import chip_of
    from lars_keras.pod.jax_programs import jax_programs
    from lars_keras.pod.report import make_report
    from lars_keras.pod.worker import checked_model, describe, devices_of

    keras.config.set_dtype_policy("mixed_bfloat16")
    accumulate = None
    missing = [chips for chips in TOPOLOGIES if (name, chips) not in {(p["model"], p["chips"]) for p in known}]
    for chips in missing:
        devices = devices_of(TOPOLOGIES[chips])
        steps = BATCH_SIZE // chips // size
        started = time.perf_counter()
        model = checked_model(MODELS[name])
        programs = jax_programs(model, parse_batch(IMAGES), devices, size, steps, known_accumulate=accumulate)
        if steps > 1:
            accumulate = programs[1]
        answer = describe(
            model,
            TOPOLOGIES[chips],
            devices,
            microbatch_size=size,
            accumulation_steps=steps,
            programs=programs,
            compile_seconds=time.perf_counter() - started,
        )
        report = make_report(answer, chip_of(TOPOLOGIES[chips]), BATCH_SIZE)
        print(f"{name}, {chips} chips\n{report}\n", flush=True)
        yield {**report.to_dict(), "model": name}


def table(points: list[dict[str, Any]]) -> str:
    """Return the points in Markdown."""
    lines = [
        "| network | weights, millions | chips | on a chip | memory, MiB | compute, ms | HBM, ms | links, ms "
        "| bound by | images/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        bounds = p["bounds"]
        cells = [
            p["model"],
            f"{p['parameters'] / 1e6:.1f}",
            str(p["chips"]),
            f"{p['accumulation_steps']} x {p['microbatch_size']}",
            f"{p['memory'] / 2**20:,.0f}",
            *(f"{1e3 * bounds['seconds'][kind]:,.2f}" for kind in ("compute", "memory", "interconnect")),
            {"memory": "HBM", "interconnect": "links"}.get(bounds["bound"], bounds["bound"]),
            f"{bounds['images_per_second']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
