"""Which machines that were copied go on here: pure functions.

A versioned machine type is QEMU's promise that a guest sees the same machine under each later version that still has
that type. microvm has no versions, so there only the same QEMU will do. The type of what a machine goes on from is in
the head of the stream of its devices.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from volant.hypervisor._interface import MachineKind

HEAD_BYTES = 64
_HEAD = re.compile(rb"QEVM\x00\x00\x00\x03\x07\x00\x00\x00(.)", re.DOTALL)
_VERSIONED = re.compile(r"pc-q35-\d{1,3}(\.\d{1,3}){1,2}", re.ASCII)


def is_versioned(machine: str) -> bool:
    return _VERSIONED.fullmatch(machine) is not None


def machine_of(state: bytes) -> str | None:
    """The versioned machine type that the first `HEAD_BYTES` of a stream say; None: they say none."""
    head = _HEAD.match(state)
    if head is None:
        return None
    name = state[head.end() :][: head[1][0]].decode("ascii", "replace")
    return name if is_versioned(name) else None


def parse_machines(listing: bytes) -> frozenset[str]:
    """The types that `-machine help` lists."""
    lines = listing.decode("utf-8", "replace").splitlines()[1:]
    return frozenset(line.split()[0] for line in lines if line.strip())


def misfit(saved: MachineKind, here: MachineKind, known: Collection[str]) -> str | None:
    """Why a machine that was copied as `saved` does not go on where new ones are `here`, for people; None: it does.
    `known` are the types that the hypervisor here has."""
    if saved.accelerator != here.accelerator:
        return f"it was made under {saved.accelerator.upper()}, and guests run under {here.accelerator.upper()} here"
    if saved.devices != here.devices:
        return f"its devices are of form {saved.devices}, and this version of Volant makes form {here.devices}"
    if not is_versioned(saved.machine):
        if (saved.machine, saved.version) == (here.machine, here.version):
            return None
        return (
            f"it was made by QEMU {saved.version}, and here is {here.version}: "
            f"the machine {saved.machine} goes on under the same one only"
        )
    if _numbers(here.version) < _numbers(saved.version):
        return f"it was made by QEMU {saved.version}, and the one here is older: {here.version}"
    if saved.machine not in known:
        return f"QEMU {here.version} does not have its machine {saved.machine} any more"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
