"""The one seam to the operating system.

Everything that other rooms want from the machine goes through a `Host` that is handed to them. `Host` composes facets:
processes, files, sockets and so on. Each facet is a protocol, which the simulated host of `tests/simulated` implements
on its own. Nothing here is a global.
"""

from ._access_lists import Grant
from ._cgroups import Cgroups, ResourceLimits, own_cgroups
from ._credentials import Credentials, is_below, loopback_peer_uid, open_as, open_below, peer_credentials
from ._descriptors import Descriptors, OpenDirectory
from ._directories import UnsafeDirectory, check_way_to, make_own_directory
from ._disk import Disk
from ._files import Files
from ._freezer import Freezer, FreezerFailed, watchdog_tag
from ._host import Clock, Host, Random, Threads
from ._limits import Limits
from ._machine import HostFigures, Machine
from ._own import Ownership, inside
from ._priorities import raise_own
from ._proc import Proc, ProcessStatus, ProcessUsage
from ._process_memory import MemoryUsage, ProcessMemory
from ._processes import Process, Processes
from ._procfs import ProcessGone, own_capabilities
from ._programs import (
    LOG_LIMIT,
    PROGRAM_ENVIRONMENT,
    CopyFailed,
    bound_log,
    copy_sparsely,
    number_of,
    numbered,
    user_of_images,
    user_of_passt,
    users_of_restricted_passt,
    users_without_vm,
)
from ._sandbox import TREES_SINCE, Sandbox, as_user, confine_self, landlock_version
from ._sandbox_access import SandboxAccess, SandboxSupport
from ._scopes import Scopes
from ._sockets import TUN, Sockets, make_permanent, open_tap
from ._watches import FileWatch, Watches

__all__ = [
    "LOG_LIMIT",
    "PROGRAM_ENVIRONMENT",
    "TREES_SINCE",
    "TUN",
    "Cgroups",
    "Clock",
    "CopyFailed",
    "Credentials",
    "Descriptors",
    "Disk",
    "FileWatch",
    "Files",
    "Freezer",
    "FreezerFailed",
    "Grant",
    "Host",
    "HostFigures",
    "Limits",
    "Machine",
    "MemoryUsage",
    "OpenDirectory",
    "Ownership",
    "Proc",
    "Process",
    "ProcessGone",
    "ProcessMemory",
    "ProcessStatus",
    "ProcessUsage",
    "Processes",
    "Random",
    "ResourceLimits",
    "Sandbox",
    "SandboxAccess",
    "SandboxSupport",
    "Scopes",
    "Sockets",
    "Threads",
    "UnsafeDirectory",
    "Watches",
    "as_user",
    "bound_log",
    "check_way_to",
    "confine_self",
    "copy_sparsely",
    "inside",
    "is_below",
    "landlock_version",
    "loopback_peer_uid",
    "make_own_directory",
    "make_permanent",
    "number_of",
    "numbered",
    "open_as",
    "open_below",
    "open_tap",
    "own_capabilities",
    "own_cgroups",
    "peer_credentials",
    "raise_own",
    "user_of_images",
    "user_of_passt",
    "users_of_restricted_passt",
    "users_without_vm",
    "watchdog_tag",
]
