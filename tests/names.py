"""Names in the project that tests use unless they are about projects."""

from __future__ import annotations

from volant.model import DEFAULT_PROJECT, Key


def named(name: str) -> Key:
    """Returns what finds a name in the default project."""
    return Key(DEFAULT_PROJECT, name)
