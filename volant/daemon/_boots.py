"""The resources of boots: templates, the warm pool, boot slots, and the sandbox."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path

from actors import Child
from volant.host import Host
from volant.hypervisor import Hypervisor
from volant.hypervisor.qemu import SandboxPlan
from volant.journal import Projection
from volant.templates import TemplateBuilder, Templates, TemplateStore, WarmPool, WarmPoolLimits
from volant.vm import BootLimiter, BootSlots, bounds_of, clones_at_once

from ._directories import memory_dir, template_dir
from ._settings import Settings, parse_uids


def own_places(settings: Settings) -> tuple[Path, ...]:
    """Returns the daemon's directories, including the targets of links."""
    places = (settings.state_dir, settings.runtime_dir, settings.cache_dir, memory_dir(settings))
    return tuple(dict.fromkeys((*places, *(path.resolve() for path in places))))


def directory_obstacle(plan: SandboxPlan | None, settings: Settings) -> str | None:
    """Returns why no VM can have a directory of the host, or None. `plan` is the sandbox of its hypervisors."""
    if settings.sandbox == "off":
        return "virtiofsd runs only in a sandbox, and the setting sandbox is off"
    if plan is None:
        return None
    if not plan.landlock:
        return "virtiofsd runs only in a sandbox with Landlock, which this kernel lacks"
    if plan.users is None and os.geteuid() == 0:
        return f"virtiofsd must not run as root, and has no other user: {plan.no_users}"
    return None


def sandbox_plan(host: Host, settings: Settings) -> SandboxPlan | None:
    """Returns the layers that this host supports, or None if the settings disable the sandbox. The daemon's directories
    must exist. Raises OSError."""
    places = own_places(settings)
    support = host.sandbox.support(places) if settings.sandbox == "auto" else None
    if support is None:
        return None
    return SandboxPlan(
        places=places,
        landlock=support.landlock,
        no_connect=support.no_connect,
        users=parse_uids(settings.vm_uids) if support.no_users is None else None,
        no_users=support.no_users,
        private=(settings.cache_dir / "artifacts", settings.cache_dir / "oci"),
    )


class Boots:
    """The templates and the warm pool of one daemon, with their slots.

    :param instance: the daemon's instance
    """

    def __init__(
        self, settings: Settings, host: Host, hypervisor: Hypervisor, projection: Projection, instance: str
    ) -> None:
        processors = len(os.sched_getaffinity(0))
        self.slots = BootSlots(
            cold=BootLimiter(settings.max_boots or 2 * processors, projection),
            clones=BootLimiter(clones_at_once(processors), projection),
        )
        self.templates = TemplateStore(host, template_dir(settings), enabled=settings.templates == "auto")
        self.warm_pool = WarmPool(
            host,
            hypervisor,
            self.templates,
            projection,
            WarmPoolLimits(
                each=None if settings.standby == "auto" else settings.standby,
                most=2 * processors,
                max_mb=settings.standby_max_mb,
                idle_s=settings.standby_idle_s,
            ),
            instance=instance,
            runtime_dir=settings.runtime_dir,
            memory_dir=memory_dir(settings),
            quiet=lambda: not self.slots.in_use,
            bounds=bounds_of,
        )
        builder = TemplateBuilder(
            host,
            hypervisor,
            self.templates,
            instance=instance,
            runtime_dir=settings.runtime_dir,
            memory_dir=memory_dir(settings),
            agent_timeout_s=settings.agent_timeout_s,
        )
        self.keeper = Child(
            "templates",
            partial(
                Templates,
                host,
                self.templates,
                builder,
                self.warm_pool,
                self.slots.cold,
                projection,
                max_bytes=settings.templates_max_mb * 2**20,
                max_age=timedelta(seconds=settings.templates_max_age_s),
            ),
            shutdown_s=10,
        )
