"""Public figures of TPU chips."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which may have several cores.

    Attributes:
        flops: peak in bfloat16, per second.
        hbm_bytes: capacity.
        hbm_bandwidth: bytes per second.
        ici_bandwidth: bytes per second that the chip sends over all its links to its neighbors.
        source: the publication of these figures.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    source: str

    def bytes_per_device(self, cores: int) -> int:
        """Return the memory of a device, of which a chip has as many as cores."""
        return int(self.hbm_bytes / cores)


_JOUPPI = 'Jouppi et al. 2021, "Ten lessons from three generations shaped Google\'s TPUv4i", table 1'
_CLOUD = "Google Cloud documentation, Cloud TPU {}: system architecture"
GIB = 2**30

CHIPS = {
    "v2": Chip(46e12, 16 * GIB, 700e9, 4 * 62e9, _JOUPPI),
    "v3": Chip(123e12, 32 * GIB, 900e9, 4 * 82e9, _JOUPPI),
    "v4": Chip(275e12, 32 * GIB, 1200e9, 6 * 50e9, 'Jouppi et al. 2023, "TPU v4" (arXiv 2304.01433), table 4'),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, _CLOUD.format("v5e")),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, _CLOUD.format("v5p")),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, _CLOUD.format("v6e")),
}


def chip_of(topology: str) -> Chip:
    """Return the chip of a topology such as `"v5e:16x16"`.

    Raises:
        ValueError: for a chip that is not in the table.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(
            f"`topology` must be CHIP:SHAPE with a chip of {', '.join(CHIPS)}, such as v5e:16x16. "
            f"Received: topology={topology}"
        )
    return CHIPS[name]
