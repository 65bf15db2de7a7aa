"""VMs: an actor for each, and all that can be done with them."""

from ._boot_limiter import BootLimiter as BootLimiter, BootSlots as BootSlots, clones_at_once as clones_at_once
from ._checkpoint_store import (
    PULLED as PULLED,
    PULLED_S as PULLED_S,
    RESERVE_MB as RESERVE_MB,
    CheckpointLost as CheckpointLost,
)
from ._copies import Copies as Copies
from ._drain import keep_drained as keep_drained
from ._fence import FenceFailed as FenceFailed, VmFence as VmFence
from ._guest_access import GuestAccess as GuestAccess
from ._image_manifest import (
    image_manifest as image_manifest,
    image_users as image_users,
    with_exposed_ports as with_exposed_ports,
)
from ._layout import (
    VmSettings as VmSettings,
    instance_of as instance_of,
    memory_file as memory_file,
    processes_of_vms as processes_of_vms,
    vm_directory as vm_directory,
)
from ._lifecycle import DELETED as DELETED, Lifecycle as Lifecycle, Version as Version, Wait as Wait
from ._machine_spec import CUSTOM_IMAGE as CUSTOM_IMAGE
from ._process import bounds_of as bounds_of
from ._vms import Vms as Vms
