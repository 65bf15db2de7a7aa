"""VMs: an actor for each, and all that can be done with them."""

from ._boot_limiter import BootLimiter, BootSlots, clones_at_once
from ._checkpoint_store import PULLED, PULLED_S, RESERVE_MB, CheckpointLost
from ._copies import Copies
from ._drain import keep_drained
from ._fence import FenceFailed, VmFence
from ._image_manifest import image_manifest, image_users, with_exposed_ports
from ._layout import VmSettings, instance_of, memory_file, processes_of_vms, vm_directory
from ._lifecycle import DELETED, Lifecycle, Version, Wait
from ._machine_spec import CUSTOM_IMAGE
from ._process import bounds_of
from ._serial import Keyboard, KeyboardTaken, Missed, NotTyped, Reader, SerialConsole
from ._streams import Streams
from ._vms import Vms

__all__ = [
    "CUSTOM_IMAGE",
    "DELETED",
    "PULLED",
    "PULLED_S",
    "RESERVE_MB",
    "BootLimiter",
    "BootSlots",
    "CheckpointLost",
    "Copies",
    "FenceFailed",
    "Keyboard",
    "KeyboardTaken",
    "Lifecycle",
    "Missed",
    "NotTyped",
    "Reader",
    "SerialConsole",
    "Streams",
    "Version",
    "VmFence",
    "VmSettings",
    "Vms",
    "Wait",
    "bounds_of",
    "clones_at_once",
    "image_manifest",
    "image_users",
    "instance_of",
    "keep_drained",
    "memory_file",
    "processes_of_vms",
    "vm_directory",
    "with_exposed_ports",
]
