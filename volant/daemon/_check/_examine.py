"""`volantd check`: runs all checks at the same time, each with a deadline: a disk or a program that hangs delays no
other check. `volar setup --check` shows the report to people.

The checks are part of the daemon because they use its settings and its code, for example to launch QEMU. They need
neither root nor a running daemon, and leave no traces: they use their own directory and network namespace.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import trio

from volant.host import Host
from volant.model.doctor import Finding, Report

from .._settings import Settings
from ._context import Context, user
from ._directories import directories, memory, virtiofsd
from ._hypervisor import hypervisor, machine, mke2fs, qemu_img
from ._network import forwarding, network
from ._oci import erofs, image, skopeo
from ._sandbox import sandbox
from ._service import cgroups, descriptors, systemd, tls

Check = Callable[[Context], Awaitable[Sequence[Finding]]]


def in_thread(check: Callable[[Context], Sequence[Finding]]) -> Check:
    """Returns a check that runs in a thread. A thread that hangs is abandoned, as the process ends soon."""

    async def run(context: Context) -> Sequence[Finding]:
        return await trio.to_thread.run_sync(check, context, abandon_on_cancel=True)

    return run


CHECKS: tuple[tuple[str, float, Check], ...] = (
    ("machine", 10.0, in_thread(machine)),
    # 10 s for QEMU's version and 10 s for a guest.
    ("qemu", 25.0, hypervisor),
    ("qemu-img", 15.0, qemu_img),
    ("mke2fs", 15.0, mke2fs),
    ("image", 20.0, in_thread(image)),
    ("skopeo", 10.0, skopeo),
    ("mkfs.erofs", 10.0, erofs),
    ("virtiofsd", 10.0, in_thread(virtiofsd)),
    ("memory", 10.0, in_thread(memory)),
    ("directories", 10.0, in_thread(directories)),
    ("tls", 10.0, in_thread(tls)),
    ("descriptors", 10.0, in_thread(descriptors)),
    ("systemd", 15.0, systemd),
    ("cgroups", 10.0, in_thread(cgroups)),
    ("sandbox", 10.0, in_thread(sandbox)),
    ("network", 15.0, network),
    ("forwarding", 10.0, in_thread(forwarding)),
)
"""Name, deadline in seconds and function of each check, in the order of the report."""


def check(settings: Settings) -> tuple[str, int]:
    """Returns the report as JSON, and the exit code: 0 if VMs can run on this host, otherwise 1."""
    report = trio.run(examine, settings, Host())
    return msgspec.json.format(msgspec.json.encode(report)).decode(), 1 if report.failed else 0


async def examine(settings: Settings, host: Host, checks: Sequence[tuple[str, float, Check]] = CHECKS) -> Report:
    """Runs all checks. Takes at most as long as the longest deadline."""
    found: dict[str, Sequence[Finding]] = {}
    scratch = Path(tempfile.mkdtemp(prefix="volant-check-"))
    try:
        async with trio.open_nursery() as nursery:
            for name, within_s, check in checks:
                nursery.start_soon(_run, name, within_s, check, Context(host, settings, scratch), found)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Report(user=user(), findings=[finding for name, _, _ in checks for finding in found[name]])


async def _run(name: str, within_s: float, check: Check, context: Context, found: dict[str, Sequence[Finding]]) -> None:
    problem = f"the check did not end within {within_s:g} s"
    with trio.move_on_after(within_s):
        try:
            found[name] = await check(context)
            return
        except OSError as error:
            problem = str(error)
    found[name] = [Finding(check=name, level="less", found=problem, means="the check has no result")]
