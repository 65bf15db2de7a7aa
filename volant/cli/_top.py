"""`volar top`: the resource use of VMs, redrawn until interrupted."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence

import click

from volant.model import VmStats

from ._complete import vm_names
from ._options import listing
from ._output import Output
from ._run import Duration, Session, command
from ._text import size

_TITLES = ("NAME", "CPU %", "MEMORY", "OF", "DISK READ/S", "WRITTEN/S", "NET RECEIVED/S", "SENT/S")
_ONCE_S = 0.5
"""How long `--once` measures."""
_CLEAR = "\x1b[H\x1b[J"


@command(None, "top")
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=vm_names)
@click.option("--once", is_flag=True, help="Measure for half a second, print the figures once, and end.")
@click.option(
    "-d", "--delay", type=Duration(), default=2.0, show_default="2s", help="The time between two measurements."
)
@listing
async def top(session: Session, names: tuple[str, ...], once: bool, delay: float) -> None:
    """Show the resource use of VMs, until interrupted.

    100 % is one processor. MEMORY is the host memory of the VM's process; memory that clones share counts for each.
    With --json, or without a terminal, the figures are printed once. With --json they count from the start of each VM's
    process.
    """
    if session.out.json:
        session.out.document(_chosen(await session.client.vms.stats(), names))
        return
    before = _chosen(await session.client.vms.stats(), names)
    if once or session.out.names or not sys.stdout.isatty():
        _pause(_ONCE_S)
        _show(session.out, before, _chosen(await session.client.vms.stats(), names))
        return
    pause_s = _ONCE_S
    try:
        while True:
            _pause(pause_s)
            now = _chosen(await session.client.vms.stats(), names)
            sys.stdout.write(_CLEAR)
            sys.stdout.flush()
            _show(session.out, before, now, shutil.get_terminal_size().lines - 2)
            before, pause_s = now, max(delay, 0.1)
    except KeyboardInterrupt:
        # It is how people end it.
        return


def _pause(seconds: float) -> None:
    """Waits. No event loop runs here."""
    time.sleep(seconds)


def _chosen(found: Sequence[VmStats], names: tuple[str, ...]) -> list[VmStats]:
    return [each for each in found if not names or each.name in names]


def _show(out: Output, before: Sequence[VmStats], now: Sequence[VmStats], most: int | None = None) -> None:
    """Prints the table, busiest VMs first. `most` is the number of rows that fit."""
    earlier = {each.name: each for each in before}
    rows = [(_rate(earlier.get(each.name), each, "cpu_s"), each) for each in now]
    rows.sort(key=lambda row: (-(row[0] or 0.0), row[1].name))
    cells = [
        (
            *(each.name, "" if cpu is None else f"{cpu * 100:.1f}"),
            *(f"{each.rss_mb:.0f} MiB", f"{each.memory_mb} MiB"),
            *(_traffic(earlier.get(each.name), each, of) for of in ("disk_read_bytes", "disk_written_bytes")),
            *(_traffic(earlier.get(each.name), each, of) for of in ("received_bytes", "sent_bytes")),
        )
        for cpu, each in rows[:most]
    ]
    out.listing(now, _TITLES, cells)


def _rate(before: VmStats | None, now: VmStats, of: str) -> float | None:
    """Returns the use per second; None for a VM that was started in between, or if the host does not know it."""
    if before is None or (more := getattr(now, of)) is None or (less := getattr(before, of)) is None:
        return None
    passed_s = now.clock_s - before.clock_s
    return None if passed_s <= 0 or more < less else float(more - less) / passed_s


def _traffic(before: VmStats | None, now: VmStats, of: str) -> str:
    rate = _rate(before, now, of)
    return "" if rate is None else size(rate)
