"""The one seam to the operating system.

Everything that other rooms want from the machine goes through a `Host` that is handed to them. `Host` composes facets:
processes, files, sockets and so on. Each facet is a protocol, which the simulated host of `tests/simulated` implements
on its own. Nothing here is a global.
"""

from ._access_lists import Grant
from ._cgroups import Cgroups, ResourceLimits, own_cgroups
from ._clock import Clock
from ._credentials import Credentials, is_below, loopback_peer_uid, open_as, open_below, peer_credentials
from ._descriptors import Descriptors
from ._directories import UnsafeDirectory, check_way_to, make_own_directory
from ._disk import Disk
from ._errors import ProcessGone
from ._files import Files
from ._host import Host
from ._limits import Limits
from ._machine import HostFigures, Machine
from ._own import Ownership, inside
from ._priority import raise_own
from ._proc import Proc, ProcessStatus
from ._process_memory import MemoryUsage, ProcessMemory
from ._processes import Process, Processes
from ._procfs import own_capabilities
from ._programs import PROGRAM_ENVIRONMENT, CopyFailed, copy_sparsely
from ._random import Random
from ._sandbox import Sandbox
from ._sandbox_access import SandboxAccess, SandboxSupport
from ._scopes import Scopes
from ._sockets import Sockets
from ._tap import TUN, make_permanent, open_tap
from ._threads import Threads
from ._watches import FileWatch, Watches

__all__ = [
    "PROGRAM_ENVIRONMENT",
    "TUN",
    "Cgroups",
    "Clock",
    "CopyFailed",
    "Credentials",
    "Descriptors",
    "Disk",
    "FileWatch",
    "Files",
    "Grant",
    "Host",
    "HostFigures",
    "Limits",
    "Machine",
    "MemoryUsage",
    "Ownership",
    "Proc",
    "Process",
    "ProcessGone",
    "ProcessMemory",
    "ProcessStatus",
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
    "check_way_to",
    "copy_sparsely",
    "inside",
    "is_below",
    "loopback_peer_uid",
    "make_own_directory",
    "make_permanent",
    "open_as",
    "open_below",
    "open_tap",
    "own_capabilities",
    "own_cgroups",
    "peer_credentials",
    "raise_own",
]
