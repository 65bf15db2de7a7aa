"""Whether images can be built here, as far as the host alone can tell."""

from __future__ import annotations

from . import _apt, _sources
from ._errors import ImageError


def obstacle() -> ImageError | None:
    """What is in the way of `build` on this host, found out without the network; None where nothing is."""
    try:
        _apt.require_programs()
        _sources.archive()
        _sources.find_keyring()
    except ImageError as error:
        return error
    return None
