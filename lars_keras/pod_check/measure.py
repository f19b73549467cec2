"""What a compiled program says of itself: memory, operations, bytes, collectives."""

import dataclasses
import math
import re
from typing import Any

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@dataclasses.dataclass
class Collective:
    """An operation between chips.

    Attributes:
        kind: `"all-reduce"`, `"all-gather"`, `"reduce-scatter"`, `"all-to-all"` or `"collective-permute"`.
        size: bytes of the whole on one chip: before a reduction, after a gathering.
        group: chips that take part together.
        dtypes: of what is sent.
    """

    kind: str
    size: int
    group: int
    dtypes: list[str]

    @property
    def sent(self) -> float:
        """Bytes that a chip sends, at least, in a ring."""
        part = (self.group - 1) / self.group
        return self.size * part * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass
class Program:
    """A compiled program, on one chip. Sizes in bytes.

    Attributes:
        name: of the part of the update.
        times: how often it runs in an update.
        arguments, outputs, aliased, temporaries, code: its memory; outputs that lie in arguments' place are aliased.
        flops: floating-point operations.
        bytes_accessed: read and written, as XLA counts it. Prefetches into on-chip memory count more than once.
        collectives: in the order of the program.
    """

    name: str
    times: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: float
    bytes_accessed: float
    collectives: list[Collective]

    @property
    def memory(self) -> int:
        """All that it holds at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def program(name: str, times: int, compiled: Any) -> Program:
    """The figures of a `jax.stages.Compiled`, or of an executable with the same methods."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return Program(
        name=name,
        times=times,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        collectives=collectives(compiled.as_text()),
    )


def collectives(hlo: str) -> list[Collective]:
    """The collectives in the text of a compiled program, each once.

    A TPU's reduce-scatter is a fusion called all-reduce-scatter, in whose body stands an all-reduce; and a collective
    that goes on beside other work stands in each of the fusions that it overlaps, with one channel and chain.
    """
    found: dict[Any, Collective] = {}
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
        # The start of an asynchronous operation gives its operands and its results.
        tensors = [(d, _size(d, dims)) for d, dims in re.findall(r"(\w+)\[([\d,]*)\]", match["result"]) if d in _BYTES]
        group = _group(line)
        size = sum(n for _, n in tensors)
        if "-start(" in line and kind != "all-reduce":
            size = max(n for _, n in tensors)
        if kind == "reduce-scatter" and not scattered:
            size *= group
        channel, chain = re.search(r"channel_id=(\d+)", line), re.search(r'chain_id="(\d+)"', line)
        key = (channel and channel[1], chain[1]) if chain else number
        found.setdefault(key, Collective(kind, size, group, sorted({d for d, _ in tensors})))
    return [c for c in found.values() if c.group > 1]


def _size(dtype: str, dims: str) -> int:
    return _BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)


def _group(line: str) -> int:
    """Size of the groups of devices of a collective."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if short := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(short[2])
    return 2 if "source_target_pairs" in line else 1
