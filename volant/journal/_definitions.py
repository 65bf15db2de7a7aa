"""Definitions: what is the same on all hosts of a fleet, of which each host's journal has a copy.

A *place* names one: `network/PROJECT/NAME`, likewise for plugins, projects and secrets; `key/DIGEST` for an API key;
and `keys-required`, which is there once TCP is closed for clients without a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from volant.model import ApiKey, Key, Network, Project, Secret, is_named, secrets_of

from . import _operations as op
from ._errors import BadRow
from ._named import KINDS, KINDS_BY_WORD, Named, Plugin
from ._projection import Projection
from ._rows import read_key, read_named
from ._stage import Stage
from ._store import Store

KEYS_REQUIRED = "keys-required"
"""The place of the flag that closes TCP for clients without a key. It is never removed."""
_KEY = "key"
_SHARED = (Plugin, Network, Project, Secret)
_encode = msgspec.json.Encoder().encode


class KeysRequired(msgspec.Struct, frozen=True):
    """TCP is closed permanently for clients without a key."""


Definition = Plugin | Network | Project | Secret | ApiKey | KeysRequired
Changes = Mapping[str, Definition | None]
"""Definitions by place; None removes one."""


def place_of(definition: Definition) -> str:
    """Returns the place of a definition."""
    if isinstance(definition, KeysRequired):
        return KEYS_REQUIRED
    if isinstance(definition, ApiKey):
        return f"{_KEY}/{definition.digest}"
    return _named_place(KINDS[type(definition)].word, definition.key)


def without_use(definition: Definition) -> Definition:
    """Returns the part of a definition that hosts share. The last use of a key is recorded by each host for itself."""
    return msgspec.structs.replace(definition, used=None) if isinstance(definition, ApiKey) else definition


def encode_definition(definition: Definition) -> bytes:
    """Returns the JSON of a definition."""
    return _encode(without_use(definition))


def read_definition(place: str, data: bytes) -> Definition:
    """Returns the definition at a place. :raises BadRow: no host can have written it."""
    if place == KEYS_REQUIRED:
        return KeysRequired()
    word, _, rest = place.partition("/")
    if word == _KEY:
        return without_use(read_key(rest, data))
    project, _, name = rest.partition("/")
    found = read_named(word, project, name, data)
    if not isinstance(found, _SHARED):
        raise BadRow(f"{place[:80]!r} is of no kind that hosts share")
    return found


def definitions_of(store: Store) -> dict[str, Definition]:
    """Returns all definitions of the journal, by place."""
    found: list[Definition] = [one for kind in _SHARED for one in store.projection.named(kind).values()]
    found += store.keys.by_digest.values()
    found += [KeysRequired()] * store.keys.required
    return {place_of(each): each for each in found}


def uses_of(projection: Projection) -> set[str]:
    """Returns the places of the definitions that VMs, volumes and snapshots of this host need."""
    found = set()
    for row in projection.rows():
        found.add(_named_place("plugin", Key(row.project, row.plugin)))
        found.update(_named_place("secret", Key(row.project, name)) for name in secrets_of(row))
        if is_named(row.network):
            found.add(_named_place("network", row.network_key))
    projects = {row.project for row in projection.rows()}
    projects |= {key.project for key in (*projection.volumes, *projection.snapshots)}
    return found | {_named_place("project", Key(name, name)) for name in projects}


def changes_in(operations: Iterable[op.Operation]) -> dict[str, Definition | None]:
    """Returns the changes of a transaction to shared definitions."""
    found: dict[str, Definition | None] = {}
    for operation in operations:
        match operation:
            case op.Put(named) if isinstance(named, _SHARED):
                found[place_of(named)] = named
            case op.Drop(named) if isinstance(named, _SHARED):
                found[place_of(named)] = None
            case op.PutKey(key):
                found[place_of(key)] = key
            case op.DropKey(digest):
                found[f"{_KEY}/{digest}"] = None
            case op.RequireKeys():
                found[KEYS_REQUIRED] = KeysRequired()
    return found


def take(stage: Stage, changes: Changes) -> None:
    """Puts definitions on a stage, in place of existing ones."""
    for place, definition in changes.items():
        match definition:
            case None:
                _drop(stage, place)
            case KeysRequired():
                stage.require_keys()
            case ApiKey():
                before = stage.keys.get(definition.digest)
                key = msgspec.structs.replace(definition, used=None if before is None else before.used)
                if key != before:
                    stage.put_key(key)
            case _:
                if stage.named(type(definition)).get(definition.key) != definition:
                    stage.put(definition)


def _drop(stage: Stage, place: str) -> None:
    word, _, rest = place.partition("/")
    if word == _KEY:
        key = stage.keys.get(rest)
        if key is not None:
            stage.drop_key(key)
    elif word in KINDS_BY_WORD:
        project, _, name = rest.partition("/")
        found: Named | None = stage.named(KINDS_BY_WORD[word].type).get(Key(project, name))
        if found is not None:
            stage.drop(found)


def _named_place(word: str, key: Key) -> str:
    return f"{word}/{key.project}/{key.name}"
