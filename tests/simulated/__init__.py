"""The simulated host: processes, guests, files and a disk that crash, lie, lose and delay as a seed decides."""

from .calls import DaemonDied
from .host import SimHost
from .images import SimImages, SimRegistry
from .machine import Machine
from .network import SimLinks, SimNetwork
from .world import Answer, Stream, Unreachable, World, simulated_world

__all__ = [
    "Answer",
    "DaemonDied",
    "Machine",
    "SimHost",
    "SimImages",
    "SimLinks",
    "SimNetwork",
    "SimRegistry",
    "Stream",
    "Unreachable",
    "World",
    "simulated_world",
]
