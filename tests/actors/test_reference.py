"""The reference names everything that is public."""

from __future__ import annotations

import re
from pathlib import Path

import actors

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "actors.md"


def test_every_public_name_is_in_the_reference_and_has_a_docstring() -> None:
    names = set(re.findall(r"`(\w+)", PAGE.read_text()))
    assert set(actors.__all__) - names == set()
    for name in actors.__all__:
        if name not in ("Tap",):  # an alias
            assert getattr(actors, name).__doc__, name
