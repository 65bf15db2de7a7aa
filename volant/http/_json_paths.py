"""Finds which member of a dictionary is at fault: msgspec reports `$.actions[...].path`, without its name."""

from __future__ import annotations

import re
from typing import Any

import msgspec

_MEMBER = re.compile(r"`\$(?P<way>(?:\.[A-Za-z_]\w*|\[\d+\])*)\[\.\.\.\]")
_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[(\d+)\]")


def with_member(text: str, data: bytes, kind: type[Any]) -> str:
    """The text of a ValidationError about `data`, with the name of the member in place of its first `[...]`.

    Found by halves, as msgspec keeps it to itself: a dictionary of n members takes log n conversions.
    """
    found = _MEMBER.search(text)
    if found is None:
        return text
    try:
        root = msgspec.json.decode(data)
        owner, last = None, None
        inner = root
        for name, index in _STEP.findall(found["way"]):
            owner, last = inner, name or int(index)
            inner = inner[last]
        if owner is None or not isinstance(inner, dict):
            return text
        members = list(inner.items())
        while len(members) > 1:
            half = members[: len(members) // 2]
            owner[last] = dict(half)
            members = half if _error(root, kind) == text else members[len(half) :]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        return text
    name = members[0][0][:80].replace("`", "'")
    return f"{text[: found.end() - len('[...]')]}.{name}{text[found.end() :]}"


def _error(value: object, kind: type[Any]) -> str:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return str(error)
    return ""
