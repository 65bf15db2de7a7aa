"""Placement of a new VM: the hosts that can run it, best first.

The host that receives the VM decides: its own admission knows its commitments, so no host is ever overcommitted,
however many others place VMs on it at the same time. If it refuses, the next one is asked. Reports of hosts may be some
seconds old, and only decide the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from volant.model import HostView, Placement, Problem, first_few


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The requirements of a new VM for its host."""

    memory_mb: int = 0
    disk_mb: int = 0
    architecture: str = ""
    placement: Placement = Placement()


LabelsOn = Callable[[str], Iterable[Mapping[str, str]]]
"""Returns the labels of the VMs that a host has in the project, by its name."""


def place(hosts: Iterable[HostView], wanted: Wanted, *, here: str, labels_on: LabelsOn = lambda host: ()) -> list[str]:
    """Returns the names of the hosts that may run a VM, best first, which is the one with the largest share of free
    memory.

    :param here: the host that answers; it comes first among equals, as no other host is needed
    :raises Problem: 503, no host can run it, with the reasons
    """
    fitting: list[HostView] = []
    reasons: list[str] = []
    for host in hosts:
        obstacle = obstacle_on(host, wanted, labels_on)
        if obstacle is None:
            fitting.append(host)
        else:
            reasons.append(f"{host.name}: {obstacle}")
    if not fitting:
        raise Problem(
            503, "no-host", f"no host of the fleet can take the VM ({first_few(reasons)})",
            hint="ask for less, undrain a host, or add one", retry_after_s=10,
        )  # fmt: skip
    return [host.name for host in sorted(fitting, key=lambda host: (-_free_share(host), host.name != here, host.name))]


def obstacle_on(host: HostView, wanted: Wanted, labels_on: LabelsOn) -> str | None:
    """Returns why a host can't run a VM; None if it can, as far as is known."""
    if host.state != "up":
        return "it gives no sign of life"
    if host.draining_since is not None:
        return "it is draining"
    if wanted.architecture and host.architecture != wanted.architecture:
        return f"it is {host.architecture}"
    if host.free_memory_mb < wanted.memory_mb:
        return f"it has {host.free_memory_mb} MiB of memory left"
    if host.free_disk_mb < wanted.disk_mb:
        return f"it has {host.free_disk_mb} MiB of disk left"
    return _not_wanted(host, wanted.placement, labels_on)


def _not_wanted(host: HostView, placement: Placement, labels_on: LabelsOn) -> str | None:
    if placement.zone is not None and host.zone != placement.zone:
        return f"it is in zone {host.zone!r}" if host.zone else "it is in no zone"
    if not _has(host.labels, placement.labels):
        return f"it lacks the labels {_text(placement.labels)}"
    if placement.affinity and not any(_has(labels, placement.affinity) for labels in labels_on(host.name)):
        return f"it has no VM with {_text(placement.affinity)}"
    if placement.anti_affinity and any(_has(labels, placement.anti_affinity) for labels in labels_on(host.name)):
        return f"it has a VM with {_text(placement.anti_affinity)}"
    return None


def _has(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in wanted.items())


def _text(labels: Mapping[str, str]) -> str:
    return first_few([f"{name}={value}" for name, value in labels.items()])


def _free_share(host: HostView) -> float:
    """Returns the share of free memory, in steps, so that similar hosts are equal."""
    return round(20 * host.free_memory_mb / max(1, host.memory_mb)) / 20
