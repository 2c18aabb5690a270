"""Training over several processes: data parallel and layer parallel, with torch.distributed."""

from pctt.parallel.data import DataParallel
from pctt.parallel.group import Group, PeerLost, Traffic, connect
from pctt.parallel.launch import Ranks, run
from pctt.parallel.layers import LayerParallel

__all__ = [
    "DataParallel",
    "Group",
    "LayerParallel",
    "PeerLost",
    "Ranks",
    "Traffic",
    "connect",
    "run",
]
