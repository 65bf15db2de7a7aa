"""`volar system`, whose commands are in several modules."""

from __future__ import annotations

import click


@click.group(name="system")
def group() -> None:
    """Inspect, maintain and back up the daemon."""
