"""Chooses the sandbox for this daemon's hypervisors; see `docs/explanation/sandbox.md`."""

from __future__ import annotations

from volant.host import Host
from volant.hypervisor.qemu import SandboxPlan

from ._directories import memory_dir
from ._settings import Settings, parse_uids


def sandbox_plan(host: Host, settings: Settings) -> SandboxPlan | None:
    """Returns which layers this host supports, or None when the settings turn the sandbox off. The daemon's directories
    must exist. Raises OSError."""
    places = (settings.state_dir, settings.runtime_dir, settings.cache_dir, memory_dir(settings))
    support = host.sandbox.support(places) if settings.sandbox == "auto" else None
    if support is None:
        return None
    return SandboxPlan(
        places=places,
        landlock=support.landlock,
        no_connect=support.no_connect,
        users=parse_uids(settings.vm_uids) if support.no_users is None else None,
        no_users=support.no_users,
        private=settings.cache_dir / "media",
    )
