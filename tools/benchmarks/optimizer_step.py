"""Time one update of the optimizer against other optimizers and against the bandwidth of the memory.

    python -m tools.benchmarks.optimizer_step --out=results/optimizer_step.json --plot=docs/optimizer_step.svg
    XLA_FLAGS=--xla_cpu_max_isa=AVX2 python -m tools.benchmarks.optimizer_step --dtypes=float32 --modes=xla,graph,jit \
        --out=results/optimizer_step_avx2.json
    python -m tools.benchmarks.optimizer_step --step_batch=64 --out=results/optimizer_training_step.json
    KERAS_BACKEND=jax python -m tools.benchmarks.optimizer_step --updates=20 --out=results/optimizer_step_gpu.json

The last command suits a GPU and needs no TensorFlow. Candidates take turns, `--updates` updates each, in an order that
changes from round to round, so all see the same noise. Figures are medians over the rounds. On JAX the updates of a
turn are a loop of one program: in a training step, too, the update is no program of its own. The bandwidth is that of
`x += y` through the same compiler. The bandwidth bound is the time for the bytes that the rule must move. Extra memory
is the growth of the process's peak during one turn; on JAX it is the size of the compiled program's temporary buffers.
`--draw_only` draws the plot from the file of `--out`.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops

import models
from lars_keras import LAMB, LARS
from lars_keras._keras_internals import variable_index
from lars_keras.versions import versions
from tools.benchmarks.machines import machine
from tools.benchmarks.optimizer_plot import plot
from tools.committed import write_json

BACKEND = keras.backend.backend()
NETWORKS = {"alexnet": "alexnet_bn", "resnet50": "resnet50"}
MODES = ("xla", "jit", "graph", "eager")
PACKAGES = ("keras", "tensorflow", "tensorflow-cpu", "jax", "optax", "torch", "timm", "numpy")
# Bytes per parameter of float32: reads of two norms, then gradient, weights and slots in, weights and slots out.
TRAFFIC = {"sgd": 20, "lars": 28, "lamb": 40}


@dataclasses.dataclass
class Candidate:
    """Hold one way to update. `step` takes the updates of a turn and returns when the device is done."""

    name: str
    mode: str
    rule: str
    step: Callable[[], Any]
    temporary_bytes: Callable[[], int | None] | None = None


class StraightforwardLARS(keras.optimizers.SGD):
    """Apply the equations of LARS in Keras operations, variable by variable, as most people write them."""

    def update_step(self, gradient, variable, learning_rate):
        w, v = ops.convert_to_tensor(variable), self.momentums[variable_index(self, variable)]
        learning_rate = ops.cast(learning_rate, w.dtype)
        if len(variable.shape) > 1:
            w_norm, g_norm = ops.sqrt(ops.sum(ops.square(w))), ops.sqrt(ops.sum(ops.square(gradient)))
            learning_rate *= ops.where(w_norm * g_norm > 0, 1e-3 * w_norm / (g_norm + 5e-4 * w_norm), 1.0)
            gradient = gradient + 5e-4 * w
        self.assign(v, self.momentum * v + learning_rate * gradient)
        self.assign_sub(variable, v)


def shapes_of(network: str) -> list[tuple[int, ...]]:
    """Return the shapes of the trainable variables, for 1000 classes."""
    size = models.default_image_size(NETWORKS[network])
    model = models.get(NETWORKS[network], num_classes=1000, input_shape=(size, size, 3), seed=0)
    return [tuple(v.shape) for v in model.trainable_variables]


def keras_optimizers(names: Sequence[str] | None = None) -> dict[str, tuple[str, keras.optimizers.Optimizer]]:
    """Return the rule and the optimizer by name: all, or those of `names`."""
    found = {
        "Keras SGD+momentum": ("sgd", keras.optimizers.SGD(1e-6, momentum=0.9)),
        "LARS (ours)": ("lars", LARS(1.0)),
        "straightforward LARS": ("lars", StraightforwardLARS(1.0, momentum=0.9)),
        "LAMB (ours)": ("lamb", LAMB(1e-6)),
        "Keras Lamb": ("lamb", keras.optimizers.Lamb(1e-6)),
    }
    return {name: value for name, value in found.items() if names is None or name in names}


def candidates(
    shapes: Sequence[tuple[int, ...]], dtype: str, modes: Sequence[str] = MODES, updates: int = 1
) -> list[Candidate]:
    """Return all candidates that can run here, in the modes asked for, on the same gradients."""
    rng = np.random.default_rng(0)
    weights = [0.02 * rng.standard_normal(s, "float32") for s in shapes]
    gradients = [0.01 * rng.standard_normal(s, "float32") for s in shapes]
    found = tensorflow_candidates(weights, gradients, dtype, updates=updates) if BACKEND == "tensorflow" else []
    found += jax_candidates(weights, gradients, dtype, updates=updates)
    found += torch_candidates(weights, gradients, dtype, updates)
    return [c for c in found if c.mode in modes]


def tensorflow_candidates(
    weights: list, gradients: list, dtype: str, names: Sequence[str] | None = None, updates: int = 1
) -> list[Candidate]:
    """Return Keras optimizers, ours among them, or those of `names`, compiled by XLA, in a graph and eager."""
    import tensorflow as tf

    variables = [keras.Variable(w, dtype=dtype, name=f"kernel_{i}") for i, w in enumerate(weights)]
    g = [tf.constant(x, dtype) for x in gradients]
    found = []
    for name, (rule, optimizer) in keras_optimizers(names).items():
        optimizer.build(variables)

        def update(optimizer: keras.optimizers.Optimizer = optimizer) -> None:
            optimizer.apply(g)

        for mode in ("xla", "graph", "eager"):
            program = update if mode == "eager" else tf.function(update, jit_compile=mode == "xla", autograph=False)

            def step(program: Callable[[], Any] = program) -> None:
                for _ in range(updates):
                    program()
                variables[-1].numpy()  # waits for the device

            found.append(Candidate(name, mode, rule, step))
    return found


def jax_candidates(
    weights: list, gradients: list, dtype: str, names: Sequence[str] | None = None, updates: int = 1
) -> list[Candidate]:
    """Return optax's optimizers, and on the JAX backend those of Keras, or those of `names`, under `jax.jit`."""
    try:
        import jax
    except ImportError:
        return []
    g = [jax.numpy.asarray(x, dtype) for x in gradients]
    found = []

    def add(name: str, rule: str, update: Callable, state: Any) -> None:
        def several(w: Any, state: Any, g: Any) -> Any:
            def body(_: Any, held: Any) -> Any:
                return update(*jax.lax.optimization_barrier((*held, g)))  # or what depends on g alone is taken out

            return jax.lax.fori_loop(0, updates, body, (w, state))

        program = jax.jit(several if updates > 1 else update, donate_argnums=(0, 1))
        box = [[jax.numpy.asarray(x, dtype) for x in weights], state]

        def step() -> None:
            box[:] = jax.block_until_ready(program(box[0], box[1], g))

        def temporary_bytes() -> int:
            analysis = program.lower(box[0], box[1], g).compile().memory_analysis()
            assert analysis
            return analysis.temp_size_in_bytes

        found.append(Candidate(name, "jit", rule, step, temporary_bytes))

    if BACKEND == "jax":
        for name, (rule, optimizer) in keras_optimizers(names).items():
            variables = [keras.Variable(w, dtype=dtype, name=f"kernel_{i}") for i, w in enumerate(weights)]
            optimizer.build(variables)
            # A copy, because the arrays are given away.
            state = [jax.numpy.array(v.value) for v in optimizer.variables]
            add(name, rule, lambda w, s, g, o=optimizer: o.stateless_apply(s, g, w), state)
    try:
        import optax
    except ImportError:
        return found
    transforms: dict[str, tuple[str, Any]] = {
        "optax.sgd+momentum": ("sgd", optax.sgd(1e-6, 0.9)),
        "optax.lars": ("lars", optax.lars(1e-3, weight_decay=5e-4)),
        "optax.lamb": ("lamb", optax.lamb(1e-6, weight_decay=0.01)),
    }
    for name, (rule, transform) in transforms.items():
        if names is not None and name not in names:
            continue

        def update(w, state, g, transform=transform):
            updates, state = transform.update(g, state, w)
            return optax.apply_updates(w, updates), state

        add(name, rule, update, transform.init([jax.numpy.asarray(x, dtype) for x in weights]))
    return found


def torch_candidates(weights: list, gradients: list, dtype: str, updates: int = 1) -> list[Candidate]:
    """Return torch's SGD, and timm's LARS, where they are installed."""
    try:
        import torch
    except ImportError:
        return []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = [torch.tensor(w, device=device).to(getattr(torch, dtype)).requires_grad_() for w in weights]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = torch.tensor(g, device=device).to(p.dtype)
    found: dict[str, tuple[str, Any]] = {"torch SGD+momentum": ("sgd", torch.optim.SGD(parameters, 1e-6, 0.9))}
    with contextlib.suppress(ImportError):
        from timm.optim import Lars

        found["timm Lars"] = "lars", Lars(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step(optimizer: Any) -> float:
        for _ in range(updates):
            optimizer.step()
        return float(parameters[-1].detach().sum())  # waits for the device

    unknown = (lambda: None) if device == "cuda" else None  # the memory of the process says nothing of the device
    return [
        Candidate(name, "eager", rule, functools.partial(step, optimizer), unknown)
        for name, (rule, optimizer) in found.items()
    ]


def bandwidth_probe(numbers: int, updates: int = 1) -> Candidate:
    """Return `x += y` on `numbers` float32 through the backend's own compiler: 12 bytes each."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        x, y = tf.Variable(np.zeros([numbers], "float32")), tf.constant(np.ones([numbers], "float32"))

        @tf.function(jit_compile=True, autograph=False)
        def program():
            x.assign(x + y)

        return Candidate("memory", "xla", "", lambda: ([program() for _ in range(updates)], x[:1].numpy()))
    import jax

    box, one = [jax.numpy.zeros([numbers], "float32")], jax.numpy.ones([numbers], "float32")
    compiled = jax.jit(lambda x, y: jax.lax.fori_loop(0, updates, lambda _, x: x + y, x), donate_argnums=0)

    def step() -> None:
        box[0] = jax.block_until_ready(compiled(box[0], one))

    return Candidate("memory", "jit", "", step)


def take_turns(runners: Sequence[Candidate], rounds: int, updates: int = 1) -> list[list[float]]:
    """Return the seconds per update of each runner in each round, after two rounds that are not counted."""
    times: list[list[float]] = [[] for _ in runners]
    order = list(range(len(runners)))
    shuffle = random.Random(0).shuffle
    for r in range(rounds + 2):
        shuffle(order)
        for i in order:
            start = time.perf_counter()
            runners[i].step()
            if r >= 2:
                times[i].append((time.perf_counter() - start) / updates)
    return times


def extra_bytes(candidate: Candidate) -> int | None:
    """Return the bytes that an update needs for itself; None where they cannot be measured."""
    if candidate.temporary_bytes:
        return candidate.temporary_bytes()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the update would find its memory in what was freed but kept
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak starts again at what is resident now
        before = _status_bytes("VmRSS")
        candidate.step()
        return max(_status_bytes("VmHWM") - before, 0)
    except OSError:
        return None


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(key + ":"))


def measure(
    shapes: Sequence[tuple[int, ...]], dtype: str, rounds: int, modes: Sequence[str] = MODES, updates: int = 1
) -> dict[str, Any]:
    """Time every candidate on variables of `shapes`."""
    parameters = sum(map(math.prod, shapes))
    runners = [bandwidth_probe(parameters, updates), *candidates(shapes, dtype, modes, updates)]
    (memory, *rest) = take_turns(runners, rounds, updates)
    bandwidth = 12 * parameters / statistics.median(memory)
    size = 2 if dtype in ("bfloat16", "float16") else 4
    rows: list[dict[str, Any]] = []
    for candidate, seconds in zip(runners[1:], rest, strict=True):
        extra = extra_bytes(candidate)
        rows.append(
            {
                "name": candidate.name,
                "mode": candidate.mode,
                "milliseconds": 1e3 * statistics.median(seconds),
                "quartiles": [1e3 * q for q in statistics.quantiles(seconds, n=4)[::2]] if rounds > 1 else None,
                "floor_milliseconds": 1e3 * TRAFFIC[candidate.rule] * size / 4 * parameters / bandwidth,
                "extra_share_of_weights": None if extra is None else extra / (size * parameters),
            }
        )
    base = next(r["milliseconds"] for r in rows if "SGD" in r["name"] and r["mode"] in ("xla", "jit"))
    for row in rows:
        row["times_sgd"] = row["milliseconds"] / base
    return {"parameters": parameters, "variables": len(shapes), "dtype": dtype, "bandwidth": bandwidth, "rows": rows}


def measure_steps(batch_size: int, rounds: int) -> dict[str, Any]:
    """Time whole training steps of `alexnet_bn` through `Trainer`, as train.py takes them, on TensorFlow."""
    import tensorflow as tf

    from lars_keras.report.layers import LayerTelemetry
    from lars_keras.report.log import MetricsLog
    from lars_keras.training import Trainer

    size = models.default_image_size("alexnet_bn")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, size, size, 3), "uint8")
    labels = np.eye(1000, dtype="float32")[rng.integers(0, 1000, batch_size)]
    data = tf.data.Dataset.from_tensors((images, labels)).repeat()

    def runner(name: str, optimizer: keras.optimizers.Optimizer, telemetry: bool = False) -> Candidate:
        model = models.get("alexnet_bn", num_classes=1000, input_shape=(size, size, 3), seed=0)
        model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
        trainer = Trainer(model, batch_size=batch_size, variable_norms=True, trust_ratios=telemetry)
        log = MetricsLog(tempfile.mkdtemp())
        callbacks = [log, LayerTelemetry(trainer, log, update_freq=1)] if telemetry else [log]
        return Candidate(
            name, "trainer", "", lambda: trainer.fit(data, steps_per_epoch=1, verbose=0, callbacks=callbacks)
        )

    runners = [
        runner("Keras SGD+momentum", keras.optimizers.SGD(1e-6, momentum=0.9)),
        runner("LARS (ours)", LARS(1.0)),
        runner("LARS (ours), telemetry of every update", LARS(1.0), telemetry=True),
    ]
    times = take_turns(runners, rounds)
    medians = [statistics.median(seconds) for seconds in times]
    # The median of the ratios, because the noise of a round is common to its steps.
    ratios = {
        "lars_over_sgd": statistics.median(b / a for a, b in zip(times[0], times[1], strict=True)),
        "telemetry_over_none": statistics.median(c / b for b, c in zip(times[1], times[2], strict=True)),
    }
    names = [r.name for r in runners]
    return {
        "batch_size": batch_size,
        "milliseconds": {n: 1e3 * m for n, m in zip(names, medians, strict=True)},
    } | ratios


def table(network: str, result: dict[str, Any]) -> str:
    """Return the measurement as text."""
    lines = [
        f"\n{network}, {result['parameters'] / 1e6:.1f}M parameters, {result['variables']} variables, "
        f"{result['dtype']}; memory {result['bandwidth'] / 1e9:.1f} GB/s",
        f"{'optimizer':<22} {'mode':<6} {'ms':>8} {'x SGD':>7} {'bound ms':>9} {'x bound':>8} {'extra memory':>13}",
    ]
    for r in sorted(result["rows"], key=lambda r: r["milliseconds"]):
        extra = r["extra_share_of_weights"]
        lines.append(
            f"{r['name']:<22} {r['mode']:<6} {r['milliseconds']:>8.2f} {r['times_sgd']:>7.2f} "
            f"{r['floor_milliseconds']:>9.1f} {r['milliseconds'] / r['floor_milliseconds']:>8.2f} "
            f"{'-' if extra is None else format(extra, '.1%'):>13}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the measurement that the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default="alexnet,resnet50")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--modes", default=",".join(MODES), help="modes to time, xla or jit among them")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=1, help="of a turn")
    parser.add_argument("--step_batch", type=int, help="time training steps of alexnet_bn at this batch size instead")
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--plot", help="SVG file of the results")
    parser.add_argument("--draw_only", action="store_true", help="draw --plot from the file of --out")
    args = parser.parse_args()
    if args.draw_only:
        plot(json.loads(Path(args.out).read_text(encoding="utf-8"))["results"], Path(args.plot))
        return
    about = {
        "backend": BACKEND,
        "machine": machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_before": os.getloadavg()[0],
        "rounds": args.rounds,
        "updates": args.updates,
        "versions": versions(PACKAGES),
    }
    print(json.dumps(about))
    results: dict[str, Any] = {}

    def keep() -> None:  # after each measurement, so a run that is stopped keeps the earlier ones
        if args.out:
            write_json(Path(args.out), about | {"load_after": os.getloadavg()[0], "results": results})

    if args.step_batch:
        results["training step of alexnet_bn"] = measure_steps(args.step_batch, args.rounds)
        print(json.dumps(results, indent=1))
        keep()
        return
    for network in args.networks.split(","):
        for dtype in args.dtypes.split(","):
            result = measure(shapes_of(network), dtype, args.rounds, args.modes.split(","), args.updates)
            results[f"{network}, {dtype}"] = result
            print(table(network, result), flush=True)
            keep()
            gc.collect()
    if args.plot:
        plot(results, Path(args.plot))


if __name__ == "__main__":
    main()
