"""The only interface to the operating system.

Other packages access the machine through a `Host` that is passed to them. `Host` composes facets: processes, files,
sockets and so on. Each facet is a protocol, which the simulated host of `tests/simulated` implements separately.
Nothing here is a global.
"""

from ._access_lists import Grant as Grant
from ._cgroups import Cgroups as Cgroups, ResourceLimits as ResourceLimits, own_cgroups as own_cgroups
from ._descriptors import Descriptors as Descriptors, OpenDirectory as OpenDirectory
from ._directories import (
    UnsafeDirectory as UnsafeDirectory,
    check_way_to as check_way_to,
    make_own_directory as make_own_directory,
)
from ._disk import Disk as Disk
from ._files import Files as Files
from ._freezer import Freezer as Freezer, FreezerFailed as FreezerFailed, watchdog_tag as watchdog_tag
from ._host import Clock as Clock, Host as Host, Random as Random, Threads as Threads
from ._limits import Limits as Limits
from ._machine import HostFigures as HostFigures, Machine as Machine
from ._own import Ownership as Ownership, inside as inside
from ._priorities import raise_own as raise_own
from ._proc import Proc as Proc, ProcessStatus as ProcessStatus, ProcessUsage as ProcessUsage
from ._process_memory import MemoryUsage as MemoryUsage, ProcessMemory as ProcessMemory
from ._processes import Process as Process, Processes as Processes
from ._procfs import ProcessGone as ProcessGone, own_capabilities as own_capabilities
from ._programs import (
    LOG_LIMIT as LOG_LIMIT,
    PROGRAM_ENVIRONMENT as PROGRAM_ENVIRONMENT,
    CopyFailed as CopyFailed,
    bound_log as bound_log,
    copy_sparsely as copy_sparsely,
    number_of as number_of,
    numbered as numbered,
    user_of_images as user_of_images,
    user_of_passt as user_of_passt,
    users_of_restricted_passt as users_of_restricted_passt,
    users_without_vm as users_without_vm,
)
from ._sandbox import (
    TREES_SINCE as TREES_SINCE,
    Sandbox as Sandbox,
    as_user as as_user,
    confine_self as confine_self,
    landlock_version as landlock_version,
)
from ._sandbox_access import SandboxAccess as SandboxAccess, SandboxSupport as SandboxSupport
from ._scopes import Scopes as Scopes
from ._sockets import (
    TUN as TUN,
    Sockets as Sockets,
    make_permanent as make_permanent,
    open_or_create_tap as open_or_create_tap,
)
from ._walk import is_below as is_below, open_below as open_below
from ._watches import FileWatch as FileWatch, Watches as Watches
