"""Whether the definitions of a host that joins fit those of the fleet."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from volant.journal import BadRow, Definition, encode_definition, read_definition
from volant.model import ApiKey, Problem, first_few

from ._interface import Entry

_MOST, _MOST_BYTES = 100, 1_000_000
"""Of one transaction: etcd takes 128 operations and 1.5 MiB."""


def obstacle(here: Mapping[str, Definition], there: Mapping[str, Entry]) -> Problem | None:
    """Returns why the definitions of a host and of the fleet can't be put together; None: they can.

    Two of the same name have to be the same, but for the times at which they were made.
    """
    fleets: dict[str, Definition] = {}
    for place, entry in there.items():
        try:
            fleets[place] = read_definition(place, entry.value)
        except BadRow:
            continue
    clashing = [place for place, own in here.items() if place in fleets and _differ(own, fleets[place])]
    holders = {key.name: key.id for key in fleets.values() if isinstance(key, ApiKey)}
    own_keys = {key.name: key.id for key in here.values() if isinstance(key, ApiKey)}
    names = [_shown(place) for place in clashing]
    names += [f"key {name}" for name, id in own_keys.items() if holders.get(name, id) != id]
    if not names:
        return None
    return Problem(
        409, "definitions-clash",
        f"this host can't join: it and the fleet have different things of the same names ({first_few(sorted(names))}); "
        "nothing of either was changed. Rename or delete them in the fleet, or on this host, run without fleet_etcd",
    )  # fmt: skip


def first_part(missing: Mapping[str, Definition]) -> dict[str, Definition]:
    """Returns as many as fit into one transaction."""
    part: dict[str, Definition] = {}
    size = 0
    for place, definition in missing.items():
        size += len(place) + len(encode_definition(definition))
        if part and (len(part) >= _MOST or size > _MOST_BYTES):
            break
        part[place] = definition
    return part


def _differ(own: Definition, other: Definition) -> bool:
    return type(own) is not type(other) or _essence(own) != _essence(other)


def _essence(definition: Definition) -> Mapping[str, object]:
    times = ("created_at", "updated_at", "used")
    return {name: value for name, value in msgspec.structs.asdict(definition).items() if name not in times}


def _shown(place: str) -> str:
    """Returns a place for people; that of a key is a digest."""
    kind, _, rest = place.partition("/")
    project, _, name = rest.partition("/")
    return f"{kind} {name}" if kind == "project" else f"{kind} {project}/{name}" if name else place
