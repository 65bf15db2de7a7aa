"""Checks whether this host can build images."""

from __future__ import annotations

from . import _apt, _sources
from ._errors import ImageError


def obstacle() -> ImageError | None:
    """Returns the error that `build` would fail with on this host, or None. Does not use the network."""
    try:
        _apt.require_programs()
        _sources.archive()
        _sources.find_keyring()
    except ImageError as error:
        return error
    return None
