"""`PodReport`: holds the answer of a check, as figures and as text."""

import dataclasses
from typing import Any

from lars_keras.pod.chips import Chip
from lars_keras.pod.measure import Collective, Program
from lars_keras.pod.roofline import Roofline, largest_microbatch, line_through, roofline

MIB = 2**20
_SMALL = MIB // 16  # bytes of a collective that gets no line of its own


@dataclasses.dataclass(frozen=True)
class PodReport:
    """The cost of an update on one device of a TPU slice. Sizes in bytes; `str(report)` is for people.

    Attributes:
        model: name of the model.
        parameters: number of its trainable weights.
        compute_dtype: compute dtype of the model.
        backend: `"jax"` or `"tensorflow"`.
        topology: chip and shape of the slice.
        device_kind: the compiler's name of the device.
        chips, devices: in the slice; a chip of v2 and v3 has two devices, its cores.
        batch_size: global batch size.
        microbatch_size: examples that a device takes through the model at once.
        accumulation_steps: micro-batches of a device in an update.
        fits: True if the update fits into the memory of a device.
        reason: the compiler's refusal, if it made no program of this size.
        memory: the most that a device holds at once; None without a program.
        capacity: memory of a device, in bytes.
        largest_microbatch_size: the largest micro-batch size that fits; None without a search, or if none fits.
        largest_is_compiled: True if that size was compiled; else it follows from the memory of two smaller sizes.
        programs: programs of an update, in order; empty without a program.
        bounds: the least time of an update; None without a program.
        chip: published figures of the chip.
        notes: remarks on this report.
        compile_seconds: seconds that the compiler took for the programs.
        versions: versions of the packages that affect a compiled program.
    """

    model: str
    parameters: int
    compute_dtype: str
    backend: str
    topology: str
    device_kind: str
    chips: int
    devices: int
    batch_size: int
    microbatch_size: int
    accumulation_steps: int
    fits: bool
    reason: str | None
    memory: int | None
    capacity: int
    largest_microbatch_size: int | None
    largest_is_compiled: bool
    programs: list[Program]
    bounds: Roofline | None
    chip: Chip
    notes: list[str]
    compile_seconds: float
    versions: dict[str, str]

    @property
    def images_per_second(self) -> float | None:
        """Examples per second of the slice, at best."""
        return self.bounds.images_per_second if self.bounds else None

    @property
    def collectives(self) -> list[Collective]:
        """Collectives of an update, one for each run."""
        return [c for p in self.programs for c in p.collectives * p.times]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return the report as lines of a name and a value."""
        return "\n".join(f"  {name:<12} {value}" for name, value in self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        plural = "es" if self.accumulation_steps > 1 else ""
        rows = [
            ("model", f"{self.model}, {self.parameters:,} trainable weights, {self.compute_dtype}"),
            (
                "batch",
                f"{self.batch_size:,} = {self.devices} {self.device_kind} devices x {self.accumulation_steps} "
                f"micro-batch{plural} x {self.microbatch_size} examples",
            ),
        ]
        if self.memory is None:
            rows.append(("memory", f"more than the {self.capacity / MIB:,.0f} MiB per device: {self.reason}"))
        else:
            rows += [row for p in self.programs for row in _program_rows(p)]
            rows.append(("memory", f"{self.memory / MIB:,.0f} of {self.capacity / MIB:,.0f} MiB per device"))
        if self.bounds:
            seconds = ", ".join(f"{kind} {_milliseconds(s)}" for kind, s in self.bounds.seconds.items())
            rows += [
                ("roofline", f"{seconds}: {self.bounds.bound} bound"),
                (
                    "at best",
                    f"{_milliseconds(self.bounds.seconds_per_update)} per update, "
                    f"{self.bounds.images_per_second:,.0f} images/s, "
                    f"{self.bounds.compute_utilization:.0%} of peak compute",
                ),
            ]
        if self.largest_microbatch_size:
            how = "" if self.largest_is_compiled else "about "
            source = "it was compiled" if self.largest_is_compiled else "by the memory of two compiled sizes"
            rows.append(("largest", f"a micro-batch of {how}{self.largest_microbatch_size} fits, {source}"))
        rows += [("note", note) for note in self.notes]
        return [*rows, ("verdict", "fits" if self.fits else "does not fit")]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.2f} us"


def _program_rows(p: Program) -> list[tuple[str, str]]:
    times = f" x {p.times}" if p.times > 1 else ""
    rows = [
        (
            p.name + times,
            f"arguments {p.arguments / MIB:,.0f} MiB, temporaries {p.temporaries / MIB:,.0f} MiB, "
            f"code {p.code / MIB:,.0f} MiB; {p.flops / 1e12:.3f} TFLOP, "
            f"{p.hbm_bytes / 1e9:.2f} GB moved ({p.bytes_accessed / 1e9:.2f} by XLA's count)",
        )
    ]
    rows += [
        ("", f"{c.kind} of {c.size / MIB:,.1f} MiB {'+'.join(c.dtypes)} over {c.group} devices")
        for c in p.collectives
        if c.size >= _SMALL
    ]
    small = sum(c.size < _SMALL for c in p.collectives)
    return [*rows, ("", f"and {small} collective{'s' * (small > 1)} of less than 64 KiB")] if small else rows


def make_report(answer: dict[str, Any], chip: Chip, batch_size: int) -> PodReport:
    """Make the report from the answer of `lars_keras.pod.worker`.

    Args:
        answer: a dictionary of `worker.answer`.
        chip: chip of the topology.
        batch_size: global batch size.
    """
    programs = [
        Program(**{**p, "collectives": [Collective(**c) for c in p["collectives"]]}) for p in answer["programs"]
    ]
    devices, cores = answer["devices"], answer["devices"] // answer["chips"]
    notes = list(answer["notes"])
    if programs and answer["backend"] == "tensorflow" and devices > 1:
        programs[-1].collectives.append(Collective("all-reduce", answer["reduced_bytes"], devices, ["float32"]))
        notes.append("TensorFlow's runtime has the all-reduce: its bytes are computed, not read from a program.")
    capacity = chip.bytes_per_device(cores)
    memory = max((p.memory for p in programs), default=None)
    local_batch = batch_size // devices
    largest, is_compiled = answer["fitting_microbatch_size"], answer["fitting_microbatch_size"] is not None
    if memory is not None and answer["smaller"]:
        small, size = answer["smaller"], answer["microbatch_size"]
        line = line_through((small["microbatch_size"], small["memory"]), (size, memory))
        largest = largest_microbatch(line, capacity, local_batch)
        is_compiled = memory <= capacity and largest == size
    return PodReport(
        **{name: answer[name] for name in _COPIED},
        batch_size=batch_size,
        fits=memory is not None and memory <= capacity,
        memory=memory,
        capacity=capacity,
        largest_microbatch_size=largest,
        largest_is_compiled=is_compiled,
        programs=programs,
        bounds=roofline(programs, chip, cores, batch_size) if programs else None,
        chip=chip,
        notes=notes,
    )


_COPIED = (
    "model",
    "parameters",
    "compute_dtype",
    "backend",
    "topology",
    "device_kind",
    "chips",
    "devices",
    "microbatch_size",
    "accumulation_steps",
    "reason",
    "compile_seconds",
    "versions",
)
