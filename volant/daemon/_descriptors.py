"""Computes how many files, sockets and pipes the daemon may have open, and how many it needs."""

from __future__ import annotations

import resource

from volant.host import Host

from ._settings import Settings

OF_VM = 20
"""Descriptors for each running VM."""
OF_CLIENTS = 256
_SMALLEST_MB = 256
"""What a small VM is promised: without `max_vms`, memory limits how many VMs there are."""
_SMALLEST_SHARE_MB = 100
"""What a small clone and its part of the reserve take where more memory is promised than the host has."""


def raise_limit() -> int:
    """Raises the soft limit, which protects programs that use select(2), to the hard limit, and returns it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def most_vms(settings: Settings, host: Host) -> int:
    """Returns how many VMs can run, by the settings or the host's memory."""
    if settings.max_vms is not None:
        return settings.max_vms
    each_mb = _SMALLEST_MB if settings.memory_overcommit == 1 else _SMALLEST_SHARE_MB
    return host.machine.memory_total_mb() // each_mb


def needed(vms: int) -> int:
    """Returns how many descriptors the daemon needs for that many VMs and for clients."""
    return OF_VM * vms + OF_CLIENTS


def suffices(limit: int, vms: int) -> bool:
    """Returns whether a limit is enough for that many VMs."""
    return limit == resource.RLIM_INFINITY or limit >= needed(vms)


def shortage(limit: int, vms: int) -> str:
    """Explains a limit that is too low."""
    room = max(0, (limit - OF_CLIENTS) // OF_VM)
    return f"that is enough for about {room} VMs; {vms} can run, which need {needed(vms)}"


ADVICE = "raise the hard limit: `ulimit -Hn`, /etc/security/limits.conf, LimitNOFILE= of a unit"
