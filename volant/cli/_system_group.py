"""`volar system`, with commands from several modules."""

from __future__ import annotations

import click

from ._lazy_group import Lazy, LazyGroup

_LAZY = {
    "backup": Lazy(
        "_backup:backup",
        "Back up the database of a running daemon to FILE: VMs, plugins, events, stored responses.",
    ),
}


@click.group(name="system", cls=LazyGroup, lazy=_LAZY)
def group() -> None:
    """Inspect, maintain and back up the daemon."""
