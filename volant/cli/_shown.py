"""How people see the daemon's objects: as rows of a list, and as names and values."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from ._output import Output
from ._text import size, span

_LABELS = {"cpu_cores": "cpus", "expires_in": "expires", "ip_address": "address"}
_UNIT = re.compile(r"_(?:at|bytes|mb|ms|percent|s)$")


class Sheet(NamedTuple):
    """How objects of one type are shown."""

    columns: Sequence[str] = ()
    """What a list shows: members, or names in `cells`. `-q` prints only the first. By default all members."""
    wide: Sequence[str] = ()
    """What a list with --wide shows besides."""
    fields: Sequence[str] = ()
    """What is shown of a single object; by default all members."""
    cells: Mapping[str, Callable[[Any], object]] = {}
    """Functions that return the text for an object: of a member whose value does not say enough, or of a column or
    field that is no member."""


def show_list(out: Output, found: Sequence[Any], sheet: Sheet, *, wide: bool = False) -> None:
    """Prints a list of objects: the document, a table, or names."""
    names = sheet.columns or (msgspec.structs.asdict(found[0]) if found else ("name",))
    names = [*names, *(sheet.wide if wide else ())]
    titles = [label(name).upper() for name in names]
    rows = ([_cell(each, name, sheet) for name in names] for each in found)
    status = next((place for place, name in enumerate(names) if name in ("status", "state")), -1)
    out.listing(found, titles, rows, status_column=status)


def show_one(out: Output, found: Any, sheet: Sheet = Sheet()) -> None:  # noqa: B008 - never changed
    """Prints an object: the document, or its members without those that are empty; nested ones at the end."""
    if out.json:
        out.document(found)
        return
    members = msgspec.structs.asdict(found) if isinstance(found, msgspec.Struct) else found
    nested = {name: value for name, value in members.items() if name not in sheet.cells and _is_nested(value)}
    names = [name for name in sheet.fields or members if name not in nested]
    out.fields([(label(name), _cell(found, name, sheet)) for name in names])
    if not sheet.fields:
        out.nested({label(name): msgspec.to_builtins(value) for name, value in nested.items()})


def label(name: str) -> str:
    """Returns the title of a member."""
    name = _UNIT.sub("", name)
    return _LABELS.get(name, name).replace("_", " ")


def text_of(name: str, value: object) -> object:
    """Returns the value of a member for people: sizes and durations with units, lists with commas."""
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
    if isinstance(value, int | float) and not isinstance(value, bool) and (unit := _UNIT.search(name)):
        return _WITH_UNIT[unit[0]](value)
    if isinstance(value, Collection) and not isinstance(value, str | Mapping):
        return ", ".join(map(str, value))
    return value


def _mib(value: float) -> str:
    return f"{value / 1024:g} GiB" if value and value % 1024 == 0 else f"{value:g} MiB"


_WITH_UNIT: Mapping[str, Callable[[float], str]] = {
    "_at": str,
    "_bytes": size,
    "_mb": _mib,
    "_ms": lambda value: f"{value:.0f} ms",
    "_percent": lambda value: f"{value:.0f} %",
    "_s": span,
}


def _cell(found: Any, name: str, sheet: Sheet) -> object:
    if (made := sheet.cells.get(name)) is not None:
        return made(found)
    return text_of(name, found[name] if isinstance(found, Mapping) else getattr(found, name))


def _is_nested(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(each, Mapping | list) for each in value.values())
    if isinstance(value, list | tuple):
        return any(isinstance(each, msgspec.Struct | Mapping | list) for each in value)
    return isinstance(value, msgspec.Struct)
