"""What VMs boot from, and how many at a time: templates, the warm pool, and the slots that boots wait for."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial

from actors import Child
from volant.host import Host
from volant.hypervisor import Hypervisor
from volant.journal import Projection
from volant.templates import TemplateBuilder, Templates, TemplateStore, WarmPool, WarmPoolLimits
from volant.vm import BootLimiter, BootSlots, bounds_of, clones_at_once

from ._directories import memory_dir, template_dir
from ._settings import Settings


class Boots:
    """The templates and the warm pool of one daemon, with their slots.

    :param instance: of the daemon
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
