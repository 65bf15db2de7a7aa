"""Which walls this daemon puts up around hypervisors; see `docs/explanation/walls.md`."""

from __future__ import annotations

from volant.host import Host
from volant.hypervisor.qemu import WallPlan

from ._directories import memory_dir
from ._settings import Settings, parse_uids


def wall_plan(host: Host, settings: Settings) -> WallPlan | None:
    """What there can be on this host, whose directories are there; None: none, as the settings say. Raises OSError."""
    places = (settings.state_dir, settings.runtime_dir, settings.cache_dir, memory_dir(settings))
    support = host.wall_support(places) if settings.walls == "auto" else None
    if support is None:
        return None
    return WallPlan(
        places=places,
        landlock=support.landlock,
        no_connect=support.no_connect,
        users=parse_uids(settings.vm_uids) if support.no_users is None else None,
        no_users=support.no_users,
        private=settings.cache_dir / "media",
    )
