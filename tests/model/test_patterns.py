"""The patterns that the API's document has for texts say what the daemon takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given, strategies as st

from volant.model import Problem
from volant.model._secret import SecretText, parse_secrets
from volant.model._volume import VolumeText, parse_directory, parse_volume


def pattern(annotated: Any) -> str:
    """Returns the pattern in a schema. `$` is the end of the text there."""
    found: str = get_args(annotated)[1].extra_json_schema["pattern"]
    return found.removesuffix("$") + r"\Z"


def parse_mount(text: str) -> object:
    return parse_directory(text) if text.startswith("/") else parse_volume(text)


CASES: list[tuple[str, Callable[[str], object]]] = [
    (pattern(SecretText), lambda text: parse_secrets([text])),
    (pattern(VolumeText), parse_mount),
]
PARTS = ["a", "/", ".", "..", ":", ",", "\x05", "\n", "᙭", "/run", "/volant", "/proc", "ro", "rw", "nocopy"]


@pytest.mark.parametrize(("accepted", "parse"), CASES, ids=["secrets", "volumes"])
@given(data=st.data())
def test_what_the_pattern_has_is_taken(accepted: str, parse: Callable[[str], object], data: st.DataObject) -> None:
    parse(data.draw(st.from_regex(accepted)))


@pytest.mark.parametrize(("accepted", "parse"), CASES, ids=["secrets", "volumes"])
@given(parts=st.lists(st.sampled_from(PARTS), max_size=12))
def test_what_is_taken_has_the_pattern(accepted: str, parse: Callable[[str], object], parts: list[str]) -> None:
    text = "".join(parts)
    try:
        parse(text)
    except Problem:
        # Some directories are the guest's own.
        assert not re.match(accepted, text) or "/proc" in text or text.partition(":")[2].startswith("/run/volant")
    else:
        assert re.match(accepted, text)
