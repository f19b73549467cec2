"""What train.py's update costs on a TPU slice: the real compiler's answer, without a TPU.

    python -m lars_keras.pod --flagfile=flags/recipes/alexnet_bn_32k.flags --topology=v5e:16x16

Run it in the checkout, with libtpu and jax as the extra `pod` pins them. Further flags are those of train.py; without
--precision it is mixed_bfloat16, as on a TPU. Exit codes: 0 it fits; 1 it does not; 2 a bad flag, an unknown topology,
or a program that does not compile.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from lars_keras.pod.chips import Chip, chip_of
from lars_keras.pod.measure import Collective, Program
from lars_keras.pod.roofline import largest_microbatch, line_through, roofline
from lars_keras.runtime.errors import UsageError

MIB = 2**20
ENGINES = ("jax", "tensorflow")
EXIT_DOES_NOT_FIT = 1
EXIT_USAGE = 2


def check(config: Any, topology: str, engine: str, *, search: bool = True) -> dict[str, Any]:
    """What one engine's update costs.

    Args:
        config: `flags.RunConfig`.
        topology: `CHIP:SHAPE`.
        engine: `"jax"` or `"tensorflow"`.
        search: compile at a smaller micro-batch as well, to say what the largest is.

    Raises:
        UsageError: with what is known, if the topology is unknown or the program does not compile.
    """
    chip = chip_of(topology)
    found = _compiled(config, topology, engine, search)
    if "error" in found:
        if found["out_of_memory"]:
            return {"engine": engine, "topology": topology, "fits": False, "reason": found["error"]}
        raise UsageError(found["error"])
    programs = [Program(**{**p, "collectives": [Collective(**c) for c in p["collectives"]]}) for p in found["programs"]]
    cores = found["devices"] // found["chips"]
    if engine == "tensorflow" and found["devices"] > 1:
        # It stands between two programs, and TensorFlow leaves it to the runtime.
        programs[-1].collectives.append(Collective("all-reduce", found["reduced_bytes"], found["devices"], ["f32"]))
    memory = max(p.memory for p in programs)
    room = chip.hbm_bytes / cores
    largest = None
    if found["smaller"]:
        line = line_through(
            (found["smaller"]["microbatch_size"], found["smaller"]["memory"]), (found["microbatch_size"], memory)
        )
        largest = largest_microbatch(line, room, config.batch_size // found["devices"])
    bound = roofline(programs, chip, cores, config.batch_size, found["updates"])
    return {
        **found,
        "topology": topology,
        "programs": [dataclasses.asdict(p) for p in programs],
        "memory": memory,
        "room": room,
        "fits": memory <= room,
        "largest_microbatch_size": largest,
        "roofline": bound,
        "flags": {**dataclasses.asdict(config)},
    }


def _compiled(config: Any, topology: str, engine: str, search: bool) -> dict[str, Any]:
    """The answer of `lars_keras.pod.programs`, in a process with that Keras backend."""
    with tempfile.TemporaryDirectory() as folder:
        request, out = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps({"flags": dataclasses.asdict(config), "topology": topology, "search": search}))
        process = subprocess.run(
            [sys.executable, "-m", "lars_keras.pod.programs", os.fspath(request), os.fspath(out)],
            env={**os.environ, "KERAS_BACKEND": engine, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not out.exists():
            last = [line for line in process.stderr.splitlines() if line.strip()][-1:] or ["no message"]
            raise UsageError(f"The {engine} step was not compiled (exit code {process.returncode}): {last[0]}")
        return json.loads(out.read_text())


def text(result: dict[str, Any], chip: Chip, batch_size: int) -> str:
    """The result for people."""
    if "programs" not in result:
        return f"  verdict: does not fit: {result['reason']}"
    programs = result["programs"]
    passes = f"{result['accumulation_steps']} micro-batch{'es' if result['accumulation_steps'] > 1 else ''}"
    rows = [
        (
            "batch",
            f"{batch_size:,} = {result['devices']} {result['device_kind']} devices x {passes} x "
            f"{result['microbatch_size']} examples",
        )
    ]
    for p in programs:
        times = f" x {p['times']}" if p["times"] > 1 else ""
        rows.append(
            (
                p["name"] + times,
                f"arguments {p['arguments'] / MIB:,.0f} MiB, temporaries {p['temporaries'] / MIB:,.0f} MiB, "
                f"code {p['code'] / MIB:,.0f} MiB; {p['flops'] / 1e12:.3f} TFLOP, "
                f"{p['hbm_bytes'] / 1e9:.2f} GB moved ({p['bytes_accessed'] / 1e9:.2f} by XLA's count)",
            )
        )
        for c in p["collectives"]:
            if c["size"] >= MIB / 16:
                rows.append(
                    ("", f"{c['kind']} of {c['size'] / MIB:,.1f} MiB {'+'.join(c['dtypes'])} over {c['group']} devices")
                )
    small = sum(c["size"] < MIB / 16 for p in programs for c in p["collectives"])
    bound = result["roofline"]
    seconds = ", ".join(f"{kind} {1e3 * s:.2f} ms" for kind, s in bound["seconds"].items())
    rows += [
        ("", f"and {small} collective{'s' if small != 1 else ''} of less than 64 KiB") if small else ("", ""),
        ("memory", f"{result['memory'] / MIB:,.0f} of {result['room'] / MIB:,.0f} MiB per device"),
        ("roofline", f"{seconds}: {bound['bound']} bound"),
        (
            "at best",
            f"{1e3 * bound['seconds_per_update']:.2f} ms an update, {bound['images_per_second']:,.0f} images/s, "
            f"{bound['hours']:.2g} hours for {result['updates']:,} updates",
        ),
    ]
    largest = result["largest_microbatch_size"]
    if largest:
        rows.append(("largest", f"micro-batch of about {largest}, by the memory of two compiled sizes"))
    rows.append(("verdict", "fits" if result["fits"] else "does not fit"))
    return "\n".join(f"  {name:<12} {value}" for name, value in rows if value)


_DIFFERENCES = """Where the engines differ:
  The all-reduce of TensorFlow is put between the programs by its runtime: its bytes here are computed, those of JAX are
  read from the compiled program. Both reduce once an update. Batch statistics are each device's own on both; with
  --sync_batch_norm TensorFlow reduces them at run time, JAX in the program. What has to be kept in shares
  (--shard_optimizer_state) is for JAX only."""


def read_config(arguments: list[str]) -> Any:
    """The flags of train.py, as `flags.RunConfig`.

    Raises:
        UsageError: where train.py is not there, or a flag is not right.
    """
    if not all(importlib.util.find_spec(name) for name in ("train", "flags", "models")):
        raise UsageError(
            "It compiles the step of train.py: run it in the checkout, where train.py, flags and models are."
        )
    import flags

    try:
        values, rest = flags.parse(["pod_check", *arguments])
        if rest:
            raise UsageError(f"Every argument must be a flag, --name=value. Received: {' '.join(rest)}")
        config = flags.read(values)
    except (absl_flags.Error, ValueError) as e:
        raise UsageError(str(e)) from e
    return config if values["precision"].present else dataclasses.replace(config, precision="mixed_bfloat16")


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lars_keras.pod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--topology", required=True, help="chip and shape of the slice, such as v5e:16x16")
    parser.add_argument("--engine", choices=(*ENGINES, "both"), default="both", help="whose step")
    parser.add_argument(
        "--one_size", action="store_true", help="do not look for the largest micro-batch: half the time"
    )
    parser.add_argument("--out", help="JSON file for the results (default: beside the run folders, in runs/)")
    options, rest = parser.parse_known_args(arguments)
    try:
        config, chip = read_config(rest), chip_of(options.topology)
        only_jax = config.shard_optimizer_state or config.reduce_dtype != "float32"
        if only_jax and options.engine == "tensorflow":
            raise UsageError("--shard_optimizer_state and --reduce_dtype are for JAX. Received: --engine=tensorflow")
        if importlib.util.find_spec("libtpu") is None:
            raise UsageError("It needs the TPU compiler: pip install 'lars-keras[pod,train]', or make pod-check.")
        name = f"{config.model}-{config.batch_size}-{options.topology.replace(':', '-')}"
        print(f"{name}, {config.precision}, compiled for {options.topology}")
        results = {}
        for engine in ENGINES if options.engine == "both" else (options.engine,):
            if engine == "tensorflow" and only_jax:
                print("tensorflow: left out, --shard_optimizer_state and --reduce_dtype are for JAX")
                continue
            results[engine] = check(config, options.topology, engine, search=not options.one_size)
            print(f"\n{engine}\n{text(results[engine], chip, config.batch_size)}", flush=True)
    except UsageError as e:
        print(f"pod_check: error: {e}", file=sys.stderr)
        return EXIT_USAGE
    print(
        f"\n{_DIFFERENCES if len(results) > 1 else ''}\n"
        f"Chip: {chip.flops / 1e12:.0f} TFLOP/s bfloat16, {chip.hbm_bytes / 2**30:.0f} GiB at "
        f"{chip.hbm_bandwidth / 1e9:.0f} GB/s, links {chip.ici_bandwidth / 1e9:.0f} GB/s out. Source: {chip.source}.\n"
        "Compiled, not run: bounds at the peaks of the chip, without overheads, input or evaluation."
    )
    out = Path(options.out or f"runs/pod-{name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"chip": dataclasses.asdict(chip), **results}, indent=1) + "\n")
    print(f"written to {out}")
    return 0 if all(r["fits"] for r in results.values()) else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
