"""Chooses the sandbox for this daemon's hypervisors; see `docs/explanation/sandbox.md`."""

from __future__ import annotations

import os
from pathlib import Path

from volant.host import Host
from volant.hypervisor.qemu import SandboxPlan

from ._directories import memory_dir
from ._settings import Settings, parse_uids


def own_places(settings: Settings) -> tuple[Path, ...]:
    """Returns the daemon's directories, also by other names where links lead there."""
    places = (settings.state_dir, settings.runtime_dir, settings.cache_dir, memory_dir(settings))
    return tuple(dict.fromkeys((*places, *(path.resolve() for path in places))))


def directory_obstacle(plan: SandboxPlan | None, settings: Settings) -> str | None:
    """Returns why no VM can have a directory of the host, or None. `plan`: of its hypervisors."""
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
    """Returns which layers this host supports, or None when the settings turn the sandbox off. The daemon's directories
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
