"""`volar system df` and `volar system prune`."""

from __future__ import annotations

from typing import get_args

import click

from volant.model import PRUNED_KINDS, StoredItem, StoredKind

from ._run import FAILED, Duration, Session, command
from ._system_group import group
from ._text import safe

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_KINDS = get_args(StoredKind)


@command(group, "df")
async def df(session: Session) -> None:
    """Show disk usage, largest first, with its users, and how much `volar system prune` can free."""
    found = await session.client.system.df()
    if session.out.json:
        session.out.document(found)
        return
    session.out.table(["KIND", "NAME", "SIZE", "USED BY"], [_row(item) for item in found.items])
    session.out.line(f"{_size(found.total_bytes)} in all, {_size(found.reclaimable_bytes)} of it unused")
    session.out.line(
        f"{_size(found.state_free_bytes)} free for the state, {_size(found.cache_free_bytes)} for the cache"
    )


@command(group, "prune")
@click.option(
    "--unused-for",
    type=Duration(),
    metavar="DURATION",
    help="Only templates that were not used for this time: 12h.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, without removing it.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(_KINDS),
    help=f"Only this kind; may be repeated.  [default: {', '.join(PRUNED_KINDS)}]",
)
async def prune(session: Session, dry_run: bool, kinds: tuple[str, ...], unused_for: float | None) -> int | None:
    """Remove unused files: images, artifacts, templates, logs of deleted VMs, leftovers.

    Files that a VM, a plugin, a snapshot or a process uses are kept. Disks without a VM, snapshots that are not in the
    database, and databases that a restore has replaced are removed only if you name them: --kind disk, snapshot,
    database.
    """
    done = await session.client.system.prune(kinds=kinds, dry_run=dry_run, unused_for_s=unused_for)
    if session.out.json:
        session.out.document(done)
    else:
        if done.items:
            session.out.table(["KIND", "NAME", "SIZE", ""], [_row(item) for item in done.items])
        session.out.line(f"{_size(done.freed_bytes)} {'would be' if dry_run else 'are'} freed")
        for kept in done.kept:
            session.out.line(f"{kept.kind} {safe(kept.name)} stays: {safe(kept.reason)}")
    return FAILED if done.kept else None


def _row(item: StoredItem) -> list[str]:
    return [item.kind, safe(item.name[:40]), _size(item.bytes), safe(", ".join(item.used_by))]


def _size(count: int) -> str:
    size = float(count)
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
