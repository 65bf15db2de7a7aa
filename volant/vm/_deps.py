"""The dependencies of a VM's actor on the rest of the daemon."""

from __future__ import annotations

import msgspec
import trio

from actors import Ref
from volant.directories import Virtiofsd
from volant.host import Host
from volant.hypervisor import Hypervisor
from volant.journal import Journal, Store
from volant.logs import VmLogs
from volant.secrets import Secrets
from volant.session import GuestLimits
from volant.templates import WarmPool

from ._boot_limiter import BootSlots
from ._checkpoint_store import CheckpointStore
from ._fence import VmFence
from ._layout import VmSettings
from ._network import VmNetworks
from ._preparation import BootPreparation
from ._process import VmProcess
from ._templates import VmTemplates


class Signal(msgspec.Struct):
    """An event that many tasks may wait for, repeatedly."""

    event: trio.Event = msgspec.field(default_factory=trio.Event)
    """Set by the next `send`, and then replaced."""

    def send(self) -> None:
        """Wakes all tasks that wait for `event`."""
        before, self.event = self.event, trio.Event()
        before.set()


class VmDeps(msgspec.Struct, frozen=True, kw_only=True):
    """The dependencies of VMs' actors."""

    host: Host
    hypervisor: Hypervisor
    journal: Ref[Journal]
    store: Store
    logs: VmLogs
    settings: VmSettings
    instance: str
    """Names this daemon's state directory in process tags, so that two daemons never mix up their processes."""
    preparation: BootPreparation
    templates: VmTemplates
    warm_pool: WarmPool
    checkpoints: CheckpointStore
    networks: VmNetworks
    virtiofsd: Virtiofsd
    secrets: Secrets
    slots: BootSlots
    fence: VmFence
    limits: GuestLimits = msgspec.field(default_factory=GuestLimits)
    processes: dict[int, VmProcess] = msgspec.field(default_factory=dict)
    """The processes under watch, by the VM's id."""
    workload_changed: Signal = msgspec.field(default_factory=Signal)
    """Sent when the state of a VM's workload changes, which is no event of the VM."""
