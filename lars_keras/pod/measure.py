"""Read a compiled program: memory, operations, bytes, collectives."""

import dataclasses
import math
import re
from typing import Any

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}
_BYTES |= dict.fromkeys(("f8e4m3fn", "f8e4m3", "f8e5m2", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz", "f8e8m0fnu"), 1)
_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_MOVES_NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")


@dataclasses.dataclass
class Collective:
    """An operation between chips.

    Attributes:
        kind: `"all-reduce"`, `"all-gather"`, `"reduce-scatter"`, `"all-to-all"` or `"collective-permute"`.
        size: bytes of the full tensors on one chip: before a reduction, or after a gathering.
        group: number of chips that take part.
        dtypes: dtypes of the tensors.
    """

    kind: str
    size: int
    group: int
    dtypes: list[str]

    @property
    def sent(self) -> float:
        """The least bytes that a chip sends: in a ring, or for a `"collective-permute"` to its one target."""
        if self.kind == "collective-permute":
            return float(self.size)
        part = (self.group - 1) / self.group
        return self.size * part * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass
class Program:
    """A compiled program, on one device. Sizes are in bytes.

    Attributes:
        name: name of the part of the update.
        times: runs in an update.
        arguments, outputs, aliased, temporaries, code: its memory; an output in the place of an argument is aliased.
        flops: floating-point operations.
        hbm_bytes: read from and written to HBM, each transfer once; see `hbm_bytes`.
        bytes_accessed: XLA's own count, in which a fetch into on-chip memory counts several times.
        collectives: in the order of the program.
        resident: memory of other parts of the update that the device holds while this one runs.
    """

    name: str
    times: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: float
    hbm_bytes: float
    bytes_accessed: float
    collectives: list[Collective]
    resident: int = 0

    @property
    def memory(self) -> int:
        """Bytes that the device holds while it runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code + self.resident


def program(name: str, times: int, compiled: Any) -> Program:
    """Return the figures of a `jax.stages.Compiled`, or of an executable with the same methods."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    text = compiled.as_text()
    return Program(
        name=name,
        times=times,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=max(0.0, float(cost.get("flops", 0.0))),  # negative where XLA does not know
        hbm_bytes=float(hbm_bytes(text)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        collectives=collectives(text),
    )


def collectives(hlo: str) -> list[Collective]:
    """Return the collectives in the text of a compiled program, each once.

    A TPU's reduce-scatter is a fusion called all-reduce-scatter, with an all-reduce in its body. A collective that
    overlaps other work stands in each of the fusions that it overlaps, with one channel and chain.
    """
    found: dict[Any, Collective] = {}
    everybody = math.prod(int(n) for n in re.findall(r"(?:replica_count|num_partitions)=(\d+)", hlo.partition("\n")[0]))
    computation = ""
    for number, line in enumerate(hlo.splitlines()):
        if not line.startswith(" "):
            computation = line
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        kind = match["kind"]
        scattered = "all-reduce-scatter" in computation.partition("(")[0]
        if scattered:
            kind = "reduce-scatter"
        found_tensors = re.findall(r"(\w+)\[([\d,]*)\]", match["result"])
        tensors = [(dtype, _size(dtype, dims)) for dtype, dims in found_tensors if dtype in _BYTES]
        group = _group(line, everybody)
        if "-start(" in line and match["kind"] != "all-reduce":  # gives its operands, its results, and maybe counters
            while len(tensors) > 2 and found_tensors[-1] in (("u32", ""), ("s32", "")):
                del found_tensors[-1], tensors[-1]
            half = len(tensors) // 2
            size = max(sum(n for _, n in part) for part in (tensors[:half], tensors[half:]))
        else:
            size = sum(n for _, n in tensors)
            if kind == "reduce-scatter" and not scattered:
                size *= group
        channel, chain = re.search(r"channel_id=(\d+)", line), re.search(r'chain_id="(\d+)"', line)
        key = (channel and channel[1], chain[1]) if chain else number
        found.setdefault(key, Collective(kind, size, group, sorted({d for d, _ in tensors})))
    return [c for c in found.values() if c.group > 1]


def hbm_bytes(hlo: str) -> int:
    """Return the bytes that the entry computation of a scheduled TPU program reads from and writes to HBM.

    An instruction reads its operands and writes its results; tensors in on-chip memory (memory space 1) do not count.
    An asynchronous copy or slice between the two memories counts at its start, once for each side in HBM. XLA's own
    "bytes accessed" covers both memories: a tensor counts four times if a copy fetches it, three times if it is fetched
    in slices that are then joined, and once more where it is used. A conditional counts only its results: batch
    normalization, the only user of conditionals, reads its inputs again in a branch that is seldom taken.
    """
    total, results = 0, {}
    for line in hlo.partition("\nENTRY")[2].splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, result, operation, rest = match.groups()
        results[name] = sum(size for size, on_chip in _tensors(result) if not on_chip)
        if operation in _MOVES_NOTHING or operation.endswith("-done"):
            continue
        if operation in ("copy-start", "slice-start"):  # (target, source, ...) and ((source), target, ...)
            first, second = _tensors(result)[:2]
            target, source = (first, second) if operation == "copy-start" else (second, first)
            total += target[0] * ((not target[1]) + (not source[1]))
        elif operation == "conditional":
            total += results[name]
        else:
            operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
            total += results[name] + sum(results.get(operand, 0) for operand in operands)
    return total


def _tensors(text: str) -> list[tuple[int, bool]]:
    """Return the size of each tensor in the text of a type, and True where it lies in on-chip memory."""
    found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", text)
    return [(_size(dtype, dims), "S(1)" in layout) for dtype, dims, layout in found if dtype in _BYTES]


def _size(dtype: str, dims: str) -> int:
    return _BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)


def _group(line: str, everybody: int) -> int:
    """Return the number of devices in a group of a collective; an empty list of groups is one of `everybody`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if short := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(short[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'a':(1)2 is a part of axis a, of size 2
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    if "replica_groups={}" in line:
        return everybody
    if "replica_groups=" in line:
        raise ValueError(f"The groups of a collective have a form that is not known. Received: {line.strip()}")
    return 2 if "source_target_pairs" in line else 1
