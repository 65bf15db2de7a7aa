"""Decides whether a saved machine can run on this host's QEMU, with pure functions.

A versioned machine type is QEMU's promise that the guest sees the same machine under every later version with that
type. microvm has no versions, so it needs the same QEMU. The head of a saved stream of devices contains the machine
type.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from volant.hypervisor._interface import MachineKind

from ._argv import FORMAT, WITH_HPET

HEAD_BYTES = 64
STATE_LIMIT = 16 * 1024 * 1024
_HEAD = re.compile(rb"QEVM\x00\x00\x00\x03\x07\x00\x00\x00(.)", re.DOTALL)
_HPET = re.compile(rb"\x04.{4}\x04hpet\x00{4}", re.DOTALL)
"""The head of a device's section: its number, the device's name, and its index among devices of that name."""
_TSC_TOLERANCE = 500e-6
"""Maximum difference of rates. Kernels measure the rate of one CPU slightly differently at each start, and NTP corrects
a clock by at most this."""
_VERSIONED = re.compile(r"pc-q35-\d{1,3}(\.\d{1,3}){1,2}", re.ASCII)


def is_versioned(machine: str) -> bool:
    return _VERSIONED.fullmatch(machine) is not None


def machine_of(state: bytes) -> str | None:
    """Returns the versioned machine type in the first `HEAD_BYTES` of a stream, or None."""
    head = _HEAD.match(state)
    if head is None:
        return None
    name = state[head.end() :][: head[1][0]].decode("ascii", "replace")
    return name if is_versioned(name) else None


def format_in(state: bytes) -> int:
    """Returns the format of the devices in a stream."""
    return WITH_HPET if _HPET.search(state) else FORMAT


def parse_machines(listing: bytes) -> frozenset[str]:
    """Returns the types that `-machine help` lists."""
    lines = listing.decode("utf-8", "replace").splitlines()[1:]
    return frozenset(line.split()[0] for line in lines if line.strip())


def incompatibility(saved: MachineKind, here: MachineKind, known: Collection[str]) -> str | None:
    """Returns why a machine that was saved as `saved` can't run here, for people, or None.

    :param here: the kind of new machines
    :param known: the machine types of the installed hypervisor
    """
    if saved.accelerator != here.accelerator:
        return f"it was made under {saved.accelerator.upper()}, and guests use {here.accelerator.upper()} here"
    if not WITH_HPET <= saved.devices <= here.devices:
        return f"its devices have format {saved.devices}, and this version of Volant uses format {here.devices}"
    if saved.tsc_khz and abs(saved.tsc_khz - here.tsc_khz) > saved.tsc_khz * _TSC_TOLERANCE:
        return f"its guest's clock needs a TSC that runs at {saved.tsc_khz} kHz, and here it is {here.tsc_khz} kHz"
    if not is_versioned(saved.machine):
        if (saved.machine, saved.version) == (here.machine, here.version):
            return None
        return (
            f"it was made by QEMU {saved.version}, and this host has {here.version}: "
            f"the machine type {saved.machine} needs the same version"
        )
    if _numbers(here.version) < _numbers(saved.version):
        return f"it was made by QEMU {saved.version}, and this host has an older one, {here.version}"
    if saved.machine not in known:
        return f"QEMU {here.version} no longer has its machine type {saved.machine}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
