"""How `volar system df` and `volar system prune` show what is on the disk."""

from __future__ import annotations

from volant.model import Pruned, StoredItem, Usage

from ._output import Output
from ._run import FAILED
from ._text import safe, size


def show_usage(out: Output, found: Usage) -> None:
    if out.json:
        out.document(found)
        return
    out.table(["KIND", "NAME", "SIZE", "USED BY"], [_row(item) for item in found.items])
    out.line(f"{size(found.total_bytes)} in all, {size(found.reclaimable_bytes)} of it unused")
    out.line(f"{size(found.state_free_bytes)} free for the state, {size(found.cache_free_bytes)} for the cache")


def show_pruned(out: Output, done: Pruned) -> int | None:
    if out.json:
        out.document(done)
    else:
        if done.items:
            out.table(["KIND", "NAME", "SIZE", ""], [_row(item) for item in done.items])
        out.line(f"{size(done.freed_bytes)} {'would be' if done.dry_run else 'are'} freed")
        for kept in done.kept:
            out.line(f"{kept.kind} {safe(kept.name)} stays: {safe(kept.reason)}")
    return FAILED if done.kept else None


def _row(item: StoredItem) -> list[str]:
    return [item.kind, safe(item.name[:40]), size(item.bytes), safe(", ".join(item.used_by))]
