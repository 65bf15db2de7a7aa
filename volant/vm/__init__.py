"""VMs: an actor for each, and all that can be done with them."""

from ._boot_limiter import BootLimiter, BootSlots, clones_at_once
from ._drain import keep_drained
from ._lifecycle import DELETED, Version, Wait
from ._paths import memory_file, vm_directory
from ._serial import Keyboard, KeyboardTaken, Missed, NotTyped, Reader, SerialConsole
from ._settings import VmSettings
from ._streams import Streams
from ._tags import instance_of, processes_of_vms
from ._vms import Vms

__all__ = [
    "DELETED",
    "BootLimiter",
    "BootSlots",
    "Keyboard",
    "KeyboardTaken",
    "Missed",
    "NotTyped",
    "Reader",
    "SerialConsole",
    "Streams",
    "Version",
    "VmSettings",
    "Vms",
    "Wait",
    "clones_at_once",
    "instance_of",
    "keep_drained",
    "memory_file",
    "processes_of_vms",
    "vm_directory",
]
