"""What a VM's actor uses of the rest of the daemon, handed in through its constructor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from actors import Ref
from volant.host import Host
from volant.hypervisor import Hypervisor
from volant.images import ArtifactCache
from volant.journal import Journal, Store, VmLogs
from volant.templates import Templates, TemplateStore, WarmPool

from ._boot_limiter import CLONES_AT_ONCE, BootLimiter
from ._checkpoints import Checkpoints
from ._network import HOSTS_AT_ONCE
from ._process import LiveProcess


@dataclass(frozen=True, kw_only=True)
class VmSettings:
    """What of the daemon's settings a VM depends on."""

    runtime_dir: Path
    cache_dir: Path
    memory_dir: Path
    """On a file system in RAM."""
    disk_dir: Path
    """Where VMs' layers over their root filesystems lie; as durable as the database."""
    template_dir: Path
    """Where templates lie."""
    snapshot_dir: Path
    """Where snapshots lie; as durable as the database."""
    kernel: Path | None = None
    initramfs: Path | None = None
    """Instead of the built image's, where a plugin brings none."""
    max_vms: int | None = None
    return_memory: bool = True
    """Whether what a guest frees goes back to the host, where its memory is its own."""
    passt_user: int | None = None
    """As whom passt runs; None: as the daemon does."""
    nameservers: tuple[str, ...] = ()
    """Whom guests with a NIC ask for names."""
    image_timeout_s: float = 300.0
    launch_timeout_s: float = 30.0
    agent_timeout_s: float = 120.0
    kill_timeout_s: float = 30.0


@dataclass
class News:
    """Something that many may wait for, again and again."""

    event: trio.Event = field(default_factory=trio.Event)
    """Set when there is something new; there is another one then."""

    def announce(self) -> None:
        before, self.event = self.event, trio.Event()
        before.set()


@dataclass(frozen=True, kw_only=True)
class VmDoors:
    """Refs and doors of a VM's actor."""

    host: Host
    journal: Ref[Journal]
    store: Store
    logs: VmLogs
    hypervisor: Hypervisor
    artifacts: ArtifactCache
    templates: TemplateStore
    builder: Ref[Templates]
    """Of templates."""
    warm_pool: WarmPool
    checkpoints: Checkpoints
    settings: VmSettings
    instance: str
    """Names this daemon's state directory in the tags of its processes, so that two daemons never mix up theirs."""
    network: Ref[Any] | None = None
    """Who keeps the host's side of networks. None: nobody, and no VM gets a tap."""
    mending: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))
    """Whose clock is set again. What that takes of the processors the others lack, whose clocks that keeps wrong."""
    telling: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(HOSTS_AT_ONCE))
    """Of who is in their network: so many guests at a time."""
    boot_slots: BootLimiter = field(default_factory=lambda: BootLimiter(4))
    clone_slots: BootLimiter = field(default_factory=lambda: BootLimiter(CLONES_AT_ONCE))
    """Of its own, as a clone is done in a tenth of a second, and would wait for cold boots for many."""
    workload_news: News = field(default_factory=News)
    """That some VM's workload has changed, which is no event of the VM's."""
    live: dict[int, LiveProcess] = field(default_factory=dict)
    """By the VM's id: what is alive of its process, for whoever wants a stream to its agent."""
