"""Several chips joined by Ethernet: how many, in which mesh, by which links, as numbers with their sources.

Nothing here opens a device; `scaling.py` predicts what training on them would take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pctt._checks import require_one_of
from pctt.placement.chips import Chip
from pctt.placement.chips import chip as find_chip


@dataclass(frozen=True)
class Box:
    """Equal chips in a mesh. `SOURCES` says where each figure comes from.

    chip_name: of each chip, in `chips.CHIPS`.
    mesh: (rows, columns) of chips; neighbours are joined.
    links: between two neighbours, that programs may use; where pairs differ, the fewest.
    link_bytes_per_second: of one link, in each of its two directions.
    hop_seconds: from a core to a core of a neighbour, beside what the bytes take.
    """

    name: str
    chip_name: str
    mesh: tuple[int, int]
    links: int
    link_bytes_per_second: float
    hop_seconds: float

    @property
    def chip(self) -> Chip:
        return find_chip(self.chip_name)

    @property
    def num_chips(self) -> int:
        return self.mesh[0] * self.mesh[1]

    def message_seconds(self, num_bytes: float) -> float:
        """From a chip to its neighbour, over all links between the two."""
        return self.hop_seconds + num_bytes / (self.links * self.link_bytes_per_second)

    def all_reduce_seconds(self, num_bytes: float, num_members: int) -> float:
        """A ring's sum of `num_bytes` over members that are neighbours in it: 2 (n - 1) messages of a share
        each (Patarasuk & Yuan 2009).
        """
        return 2 * (num_members - 1) * self.message_seconds(num_bytes / num_members)


SOURCES: Mapping[str, str] = {
    "chip_name": "an n300's chip in n300 and t3000; of a Galaxy's Wormhole no grid was asked for: that of an "
    "n150 is assumed",
    "mesh": "mesh_graph_descriptors in the ttnn 0.81.1 wheel: n300, t3k, single_galaxy, p150_x4",
    "links": "the same files: 2, 2, 4 and 4; of the 2 between the chips of an n300 dispatch keeps one "
    "(tt-metal tech_reports/EthernetMultichip/BasicEthernetGuide.md)",
    "link_bytes_per_second": "100 GbE on Wormhole: 12.5 GB/s (the same report, and tt-isa-documentation "
    "WormholeB0 EthernetTile/README.md); 400 GbE on Blackhole, of which some 30 GB/s are reached in packets "
    "of 4 KiB (tt-metal pull request 32312)",
    "hop_seconds": "0.78 to 0.80 us per hop through the fabric of Wormhole (tt-metal pull request 20903); "
    "taken over for Blackhole",
}

_GIGABIT_100, _GIGABIT_400_REACHED = 12.5e9, 30e9

BOXES: Mapping[str, Box] = {
    box.name: box
    for box in (
        Box("n300", "n300", (1, 2), 1, _GIGABIT_100, 0.8e-6),
        Box("t3000", "n300", (2, 4), 1, _GIGABIT_100, 0.8e-6),
        Box("galaxy", "n150", (8, 4), 4, _GIGABIT_100, 0.8e-6),
        Box("p150x4", "p150", (2, 2), 4, _GIGABIT_400_REACHED, 0.8e-6),
    )
}


def box(name: str) -> Box:
    """The box of that name.

    Raises:
        ValueError: there is none; the message lists those that there are.

    Example:
        >>> box("galaxy").num_chips
        32
    """
    require_one_of("box", name, tuple(BOXES))
    return BOXES[name]
