"""Computes the daemon's limit of open files, sockets and pipes, and the number that it needs."""

from __future__ import annotations

import resource

from volant.host import Host

from ._settings import Settings

OF_VM = 20
"""Descriptors for each running VM."""
OF_CLIENTS = 256
_SMALLEST_MB = 256
"""The memory promised to a small VM: without `max_vms`, memory limits the number of VMs."""
_SMALLEST_SHARE_MB = 100
"""The memory of a small clone with its part of the reserve, if more memory is promised than the host has."""


def raise_limit() -> int:
    """Raises the soft limit, which protects programs that use select(2), to the hard limit, and returns it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def most_vms(settings: Settings, host: Host) -> int:
    """Returns the maximum number of VMs, by the settings or the host's memory."""
    if settings.max_vms is not None:
        return settings.max_vms
    each_mb = _SMALLEST_MB if settings.memory_overcommit == 1 else _SMALLEST_SHARE_MB
    return host.machine.memory_total_mb() // each_mb


def needed(vms: int) -> int:
    """Returns the number of descriptors that the daemon needs for that many VMs and for clients."""
    return OF_VM * vms + OF_CLIENTS


def suffices(limit: int, vms: int) -> bool:
    """Returns whether a limit is enough for that many VMs."""
    return limit == resource.RLIM_INFINITY or limit >= needed(vms)


def shortage(limit: int, vms: int) -> str:
    """Explains a limit that is too low."""
    room = max(0, (limit - OF_CLIENTS) // OF_VM)
    return f"that is enough for about {room} VMs; {vms} can run, which need {needed(vms)}"


ADVICE = "raise the hard limit: `ulimit -Hn`, /etc/security/limits.conf, LimitNOFILE= of a unit"
