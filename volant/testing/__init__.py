"""The simulated host: processes, guests, files and a disk that crash, lie, lose and delay as a seed decides."""

from ._host import DaemonDied, SimHost
from ._machine import Machine
from ._network import SimLinks, SimNetwork
from ._world import Answer, Stream, Unreachable, World, simulated_world

__all__ = [
    "Answer",
    "DaemonDied",
    "Machine",
    "SimHost",
    "SimLinks",
    "SimNetwork",
    "Stream",
    "Unreachable",
    "World",
    "simulated_world",
]
