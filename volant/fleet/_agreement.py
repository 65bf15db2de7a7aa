"""Agreement of hosts on definitions: ordered changes, joining hosts, and each host's use of definitions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import msgspec
import trio

from volant.journal import BadRow, Definition, encode_definition, read_definition
from volant.model import ApiKey, Problem, first_few

from ._interface import Entry, EtcdError, KeyValues, OutcomeUnknown, Step, absent, put, unchanged
from ._mirror import Mirror

# The definitions that each host uses, and the keys of secrets that it has. Other hosts check both before they remove a
# definition or encrypt a secret.


USAGE = "usage/"


class Usage(msgspec.Struct, frozen=True):
    """A host's use of definitions, as it reports it."""

    uses: tuple[str, ...] = ()
    """The places of the definitions that it uses."""
    secret_keys: tuple[str, ...] = ()
    """Ids of the secret keys that it has, which do not reveal the keys."""


class Usages:
    """The usage of all hosts, including this one.

    :param uses: returns the places of the definitions that this host uses
    :param secret_keys: returns the ids of its keys for secrets
    """

    def __init__(
        self,
        etcd: KeyValues,
        mirror: Mirror,
        host: str,
        *,
        uses: Callable[[], Collection[str]],
        secret_keys: Callable[[], Awaitable[Collection[str]]],
    ) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._host = host
        self._uses = uses
        self._secret_keys = secret_keys

    async def here(self) -> Usage:
        """Returns the usage of this host."""
        return Usage(tuple(sorted(self._uses())), tuple(sorted(await self._secret_keys())))

    async def report(self) -> Usage:
        """Publishes this host's usage to the others, and returns it. :raises EtcdError:"""
        usage = await self.here()
        if _usage_of(self._mirror.section("usage").get(self._host)) != usage:
            await self._etcd.transact([], [put(USAGE + self._host, msgspec.json.encode(usage))])
        return usage

    def elsewhere(self) -> Mapping[str, Usage]:
        """Returns the usage of the other hosts, by name. Unknown hosts use nothing and have no key."""
        entries = self._mirror.section("usage")
        others = [name for name in self._mirror.section("hosts") if name != self._host]
        return {name: _usage_of(entries.get(name)) or Usage() for name in sorted(others)}


def _usage_of(entry: Entry | None) -> Usage | None:
    try:
        return None if entry is None else msgspec.json.decode(entry.value, type=Usage)
    except (msgspec.MsgspecError, ValueError):
        return None


_MOST, _MOST_BYTES = 100, 1_000_000
"""Limits of one transaction: etcd allows 128 operations and 1.5 MiB."""


def obstacle(here: Mapping[str, Definition], there: Mapping[str, Entry]) -> Problem | None:
    """Returns why the definitions of a host and of the fleet can't be merged; None if they can.

    Definitions with the same name must be equal, except for the times of their creation.
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
    """Returns as many definitions as fit into one transaction."""
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
    """Returns a place for people; for a key it is a digest."""
    kind, _, rest = place.partition("/")
    project, _, name = rest.partition("/")
    return f"{kind} {name}" if kind == "project" else f"{kind} {project}/{name}" if name else place


AGREED = "agreed"
"""The etcd key that each change writes, with the id of the change."""
CHANGED = "changed/"
_WRITE_S = 15.0
_PAUSE_S = 0.5


class Agreement:
    """Makes the changes of one host, one at a time.

    :param new_id: returns a new id for a change
    """

    def __init__(self, etcd: KeyValues, host: str, new_id: Callable[[], str]) -> None:
        self._etcd = etcd
        self._mine = CHANGED + host
        self._new_id = new_id

    async def newest(self) -> Entry | None:
        """Returns the newest change, as the quorum has it now; None if there is none. :raises EtcdError:"""
        return await self._etcd.get(AGREED)

    async def make(self, after: Entry | None, steps: Sequence[Step]) -> tuple[bytes, int] | None:
        """Makes a change of at most 126 steps after another change, and returns its id and revision. Returns None,
        without a change, if another one was made in between. It can't be cancelled in the middle.

        :raises EtcdError: the change was not and will not be made. :raises OutcomeUnknown: it may have been or will be
            made.
        """
        change = self._new_id().encode()
        with trio.move_on_after(_WRITE_S, shield=True):
            return await self._certain(change, after, steps)
        raise OutcomeUnknown(f"etcd has not said within {_WRITE_S:g} s whether it was done")

    async def _certain(self, change: bytes, after: Entry | None, steps: Sequence[Step]) -> tuple[bytes, int] | None:
        """Repeats a change until its outcome is certain. The condition lets only one of the requests succeed, however
        late they arrive. Only this host writes `changed/HOST`, which therefore shows whether one did."""
        conditions = [absent(AGREED) if after is None else unchanged(after)]
        steps = [put(AGREED, change), put(self._mine, change), *steps]
        sent = False
        while True:
            try:
                done = await self._etcd.transact(conditions, steps)
                if done.done:
                    return change, done.revision
                mine = await self._etcd.get(self._mine) if sent else None
                return (change, mine.modified) if mine is not None and mine.value == change else None
            except OutcomeUnknown:
                sent = True
            except EtcdError:
                if not sent:
                    raise
            await trio.sleep(_PAUSE_S)
