"""All checks at once, each with a deadline: a disk or a program that hangs is a finding, and holds up none of the rest.

The checks live in the daemon and not in `volar`, as what they say must be what the daemon will find: they read its
settings, launch QEMU as it does and ask the same questions of the same code. `volar` runs the program and shows what
it says. Nothing here needs a daemon that runs, or root, and nothing is left behind: what is tried is tried in a
directory of its own, and in a network namespace of its own.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from volant.host import Host
from volant.model.doctor import Finding, Report

from .._settings import Settings
from ._given import Given, user
from ._image import image
from ._machine import hypervisor, machine, qemu_img
from ._network import forwarding, network
from ._places import memory, places
from ._sandbox import sandbox
from ._service import cgroups, descriptors, systemd

Check = Callable[[Given], Awaitable[Sequence[Finding]]]


def in_thread(check: Callable[[Given], Sequence[Finding]]) -> Check:
    """A check that reads files. A thread that hangs is left behind; the process ends soon."""

    async def run(given: Given) -> Sequence[Finding]:
        return await trio.to_thread.run_sync(check, given, abandon_on_cancel=True)

    return run


CHECKS: tuple[tuple[str, float, Check], ...] = (
    ("machine", 10.0, in_thread(machine)),
    # QEMU is asked for its version, then for a guest; each has 10 s.
    ("qemu", 25.0, hypervisor),
    ("qemu-img", 15.0, qemu_img),
    ("image", 20.0, in_thread(image)),
    ("memory", 10.0, in_thread(memory)),
    ("directories", 10.0, in_thread(places)),
    ("descriptors", 10.0, in_thread(descriptors)),
    ("systemd", 15.0, systemd),
    ("cgroups", 10.0, in_thread(cgroups)),
    ("sandbox", 10.0, in_thread(sandbox)),
    ("network", 15.0, network),
    ("forwarding", 10.0, in_thread(forwarding)),
)
"""In the order in which they are told."""


async def examine(settings: Settings, host: Host, checks: Sequence[tuple[str, float, Check]] = CHECKS) -> Report:
    """Look at everything. It takes no longer than the longest deadline."""
    found: dict[str, Sequence[Finding]] = {}
    scratch = Path(tempfile.mkdtemp(prefix="volant-check-"))
    try:
        async with trio.open_nursery() as nursery:
            for name, within_s, check in checks:
                nursery.start_soon(_run, name, within_s, check, Given(host, settings, scratch), found)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Report(user=user(), findings=[finding for name, _, _ in checks for finding in found[name]])


async def _run(name: str, within_s: float, check: Check, given: Given, found: dict[str, Sequence[Finding]]) -> None:
    what = f"no answer within {within_s:g} s"
    with trio.move_on_after(within_s):
        try:
            found[name] = await check(given)
            return
        except OSError as error:
            what = str(error)
    found[name] = [Finding(check=name, level="less", found=what, means="it is not known how this is")]
