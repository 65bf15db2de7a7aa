"""VMs: an actor each, the steps of their boots, and the door to all of them."""

from ._actor import VmActor
from ._boot_limiter import CLONES_AT_ONCE, BootLimiter
from ._checkpoints import Checkpoints
from ._doors import VmDoors, VmSettings
from ._drain import keep_drained
from ._serial import Keyboard, KeyboardTaken, Missed, NotTyped, Reader, SerialConsole
from ._steps import instance_of, memory_file, vm_directory
from ._storage import prune, usage
from ._tags import processes_of_vms
from ._vms import DELETED, Version, Vms, Wait

__all__ = [
    "CLONES_AT_ONCE",
    "DELETED",
    "BootLimiter",
    "Checkpoints",
    "Keyboard",
    "KeyboardTaken",
    "Missed",
    "NotTyped",
    "Reader",
    "SerialConsole",
    "Version",
    "VmActor",
    "VmDoors",
    "VmSettings",
    "Vms",
    "Wait",
    "instance_of",
    "keep_drained",
    "memory_file",
    "processes_of_vms",
    "prune",
    "usage",
    "vm_directory",
]
