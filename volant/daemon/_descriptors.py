"""How many files, sockets and pipes the daemon may have open, and how many it needs."""

from __future__ import annotations

import resource

from volant.host import Host

from ._settings import Settings

OF_VM = 20
"""What the daemon has open for a VM that runs."""
OF_CLIENTS = 256
_SMALLEST_MB = 256
"""What is promised to a small VM of the host's memory: without `max_vms`, memory decides how many there are."""


def raise_limit() -> int:
    """Raises the soft limit, which is made for programs that use select(), to the hard one. Returns that."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def most_vms(settings: Settings, host: Host) -> int:
    """As many VMs as the settings, or else the host's memory, let run."""
    if settings.max_vms is not None:
        return settings.max_vms
    return host.memory_total_mb() // _SMALLEST_MB


def needed(vms: int) -> int:
    """As many descriptors as the daemon needs for so many VMs, and for clients."""
    return OF_VM * vms + OF_CLIENTS


def suffices(limit: int, vms: int) -> bool:
    """Whether a limit is enough for so many VMs."""
    return limit == resource.RLIM_INFINITY or limit >= needed(vms)


def shortage(limit: int, vms: int) -> str:
    """What to say of a limit that is not enough."""
    room = max(0, (limit - OF_CLIENTS) // OF_VM)
    return f"room for some {room} VMs, where {vms} may run, which need {needed(vms)}"


ADVICE = "raise the hard limit: `ulimit -Hn`, /etc/security/limits.conf, LimitNOFILE= of a unit"
