"""`volar system`, whose commands are in several modules."""

from __future__ import annotations

import click


@click.group(name="system")
def group() -> None:
    """Look at the daemon itself, and keep what it must not lose."""
