"""The definitions that all hosts share: projects, API keys, plugins, networks and encrypted secrets.

etcd has one key for each, and the journal of each host has a copy, which all reads use. The journal of the host that
receives a request decides a change, as on a single host; then it is written to etcd, based on the state that the host
has seen; and only then do journals apply it. So a change that is refused, or fails in etcd, leaves no trace.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

import trio

from actors import ActorDown, AskTimeout, Ref, Request
from volant.concurrency import Backoff
from volant.journal import (
    KEYS_REQUIRED,
    SHARED,
    BadRow,
    Changes,
    Definition,
    Draft,
    Journal,
    Store,
    TakeDefinitions,
    WriteRecord,
    definitions_of,
    encode_definition,
    journal_down,
    read_definition,
    uses_of,
    without_use,
)
from volant.model import BEGUN, Problem, Project, Secret, first_few

from ._agreement import AGREED, Agreement, Usages, first_part, obstacle
from ._interface import Entry, EtcdError, EtcdUnavailable, KeyValues, OutcomeUnknown, Step, delete, put
from ._mirror import Mirror
from ._names import unavailable

R = TypeVar("R")

SHARED_KEYS = "shared/"
SEEN = "seen/"
JOINED = "joined/"
_JOURNAL_S = 60.0
_CATCH_UP_S = 5.0
_SPREAD_S = 2.0
_LOOK_S = 2.0
_AGAIN_S = 0.1
_TRIES = 10
_RETRY_S, _RETRY_MAX_S = 0.5, 10.0
_logger = logging.getLogger("volant.fleet")


class Definitions:
    """The definitions of one host. It accepts messages like the journal, and makes the hosts agree on changes of
    definitions.

    :param id: the id of this host, the same after each restart
    :param secret_keys: returns the ids of this host's keys for secrets; `secret_keys_file` is their path, for people
    :param clear: removes the data of a project on this host that is not in the journal; :raises Problem:
    """

    def __init__(
        self,
        etcd: KeyValues,
        mirror: Mirror,
        host: str,
        id: str,
        *,
        journal: Ref[Journal],
        store: Store,
        secret_keys: Callable[[], Awaitable[Collection[str]]],
        secret_keys_file: str,
        clear: Callable[[str], Awaitable[None]],
        new_id: Callable[[], str],
    ) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._host = host
        self._id = id
        self._journal = journal
        self._store = store
        self._clear = clear
        self._secret_keys_file = secret_keys_file
        self._agreement = Agreement(etcd, host, new_id)
        self._usages = Usages(etcd, mirror, host, uses=lambda: uses_of(store.projection), secret_keys=secret_keys)
        self._changing = trio.Lock()
        self._taking = trio.Lock()
        self._at: bytes | None = None
        """The newest change in the journal; None if unknown."""
        self._at_revision = 0
        """The revision up to which the journal is complete."""
        self._moved = trio.Event()
        self._join_trouble: str | None = None
        self._take_trouble: str | None = None
        self._unreadable: tuple[str, ...] = ()
        self._lacks_keys: tuple[str, ...] = ()
        self.joined = trio.Event()
        """Set when the fleet has the definitions that only this host had."""

    @property
    def trouble(self) -> str | None:
        """The problem; None if there is none."""
        if self._join_trouble or self._take_trouble:
            return self._join_trouble or self._take_trouble
        if self._lacks_keys:
            return (
                f"secrets of the fleet are encrypted with keys that {self._secret_keys_file} of this host does not "
                f"have ({', '.join(self._lacks_keys)}): copy the file of another host, as all need the same one"
            )
        if self._unreadable:
            return f"etcd has definitions that this host can't read: {first_few(self._unreadable)}"
        return None

    # Changes

    async def ask(self, message: Request[R], /, *, timeout_s: float) -> R:
        """Returns the journal's answer; for a change of definitions, once the fleet has it.

        :raises Problem: see the change; 409, another host uses the object to remove; 503, the hosts can't agree
        """
        if type(message) not in SHARED:
            return await self._journal.ask(message, timeout_s=timeout_s)
        try:
            async with self._changing:
                reply, revision = await self._change(message)
            await self._spread(revision)
            answer: R = reply
            return answer
        except OutcomeUnknown as error:
            raise Problem(
                503, "fleet-outcome-unknown", f"it is unknown whether the fleet has this change: {error}",
                hint="look whether it was made before you send it again",
            ) from error  # fmt: skip
        except EtcdError as error:
            raise unavailable(error) from error

    async def _change(self, message: Request[Any]) -> tuple[Any, int]:
        """Returns the journal's answer, and the revision with the change. :raises Problem: :raises EtcdError:"""
        for _ in range(_TRIES):
            newest = await self._catch_up()
            drafted = await self._ask_journal(Draft(message))
            if not drafted.changes:
                return await self._take({}, message, drafted.reply), 0
            await self._check(drafted.changes)
            await self._record(message)
            made = await self._agreement.make(newest, _steps(drafted.changes))
            if made is None:
                continue
            with trio.CancelScope(shield=True):
                return await self._take_own(drafted.changes, made, message, drafted.reply), made[1]
        raise Problem(
            503, "fleet-busy", f"other hosts were faster {_TRIES} times", hint="try again", retry_after_s=1,
        )  # fmt: skip

    async def _spread(self, revision: int) -> None:
        """Waits until the other hosts have a change, so that a client may continue with any of them, and a deleted key
        is valid nowhere. A host that is too slow gets it later."""
        mirror = self._mirror
        with trio.move_on_after(_SPREAD_S):
            while any(
                _number(mirror.section("seen").get(host)) < revision
                for host in mirror.section("alive")
                if host != self._host
            ):
                await mirror.changed()

    async def _catch_up(self) -> Entry | None:
        """Waits until the journal has the agreed state of the fleet; returns the newest change. :raises EtcdError:"""
        reason = self._mirror.trouble
        if not self.joined.is_set():
            reason = self.trouble or reason or "this host has not joined yet"
        if reason is not None:
            raise EtcdUnavailable(reason)
        with trio.move_on_after(_CATCH_UP_S):
            while True:
                newest = await self._agreement.newest()
                if self._at == _id_of(newest):
                    return newest
                with trio.move_on_after(_AGAIN_S):
                    await self._moved.wait()
        raise EtcdUnavailable(self.trouble or self._mirror.trouble or "this host does not get the newest change")

    async def _check(self, changes: Changes) -> None:
        """Checks conditions that only the fleet knows. :raises Problem: 409; 503"""
        others = self._usages.elsewhere()
        for place, definition in changes.items():
            users = [host for host, usage in others.items() if definition is None and place in usage.uses]
            if users:
                kind, _, name = place.partition("/")
                raise Problem(
                    409, f"{kind}-in-use", f"the {kind} {name.rpartition('/')[2]!r} is in use on {first_few(users)}",
                    hint="delete there what uses it first",
                )  # fmt: skip
            if isinstance(definition, Secret):
                # One that is away says so itself when it is back.
                lacking = [
                    host
                    for host, usage in others.items()
                    if definition.key_id not in usage.secret_keys and host in self._mirror.section("alive")
                ]
                if lacking:
                    raise Problem(
                        503, "secrets-key-differs",
                        f"all hosts need the key that secrets are encrypted with, and the key {definition.key_id} of "
                        f"{self._secret_keys_file} on {self._host} is not on {first_few(lacking)}",
                        hint="give all hosts the same secrets_key_file, and try again",
                    )  # fmt: skip

    async def _record(self, message: Request[Any]) -> None:
        """Records that a change is about to be made, in case the daemon dies in the middle. :raises Problem:"""
        cause = getattr(message, "cause", None)
        if cause is not None and not cause.recorded:
            await self._ask_journal(WriteRecord(cause, BEGUN))

    async def _take_own(self, changes: Changes, made: tuple[bytes, int], message: Request[Any], reply: Any) -> Any:
        change, revision = made
        async with self._taking:
            if self._at_revision >= revision:
                # The mirror was faster, and may have later ones already.
                return await self._take({}, message, reply)
            taken = await self._take(changes, message, reply)
            self._arrive(change, revision)
            return taken

    async def _take(self, changes: Changes, message: Request[Any] | None = None, reply: Any = None) -> Any:
        """Applies changes to the journal. :raises Problem:"""
        return await self._ask_journal(TakeDefinitions(changes, message, reply))

    async def _ask_journal(self, message: Request[R]) -> R:
        """Returns the journal's answer. :raises Problem:"""
        try:
            return await self._journal.ask(message, timeout_s=_JOURNAL_S)
        except (ActorDown, AskTimeout) as error:
            raise journal_down(error) from error

    def _arrive(self, change: bytes, revision: int) -> None:
        self._at, self._at_revision = change, revision
        self._moved.set()
        self._moved = trio.Event()

    # Changes of other hosts

    async def keep(self) -> None:
        """Joins, and keeps the journal's copy equal to the fleet's, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report)
            nursery.start_soon(self._announce)
            while True:
                await self._join()
                await self._follow()

    async def _report(self) -> None:
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        while True:
            try:
                usage = await self._usages.report()
            except EtcdError as error:
                _logger.debug("the usage of definitions is not reported: %s", error)
                await backoff.pause()
                continue
            needed = {secret.key_id for secret in self._store.projection.secrets.values()}
            self._lacks_keys = tuple(sorted(needed - set(usage.secret_keys)))
            backoff.reset()
            await trio.sleep(_LOOK_S)

    async def _announce(self) -> None:
        """Publishes which changes this host has, for hosts that wait for it."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        while True:
            await self._moved.wait()
            announced = None
            while self._at != announced:
                arrived = self._at
                try:
                    await self._etcd.transact([], [put(SEEN + self._host, b"%d" % self._at_revision)])
                except EtcdError as error:
                    _logger.debug("what this host has seen is not announced: %s", error)
                    await backoff.pause()
                    continue
                announced = arrived
                backoff.reset()

    async def _follow(self) -> None:
        """Applies changes as they arrive. Returns if etcd has lost the fleet's data, which is not a request to delete
        everything."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        seen = 0
        self._at, self._at_revision = None, 0
        while True:
            revision = self._mirror.revision
            if 0 < revision < seen:
                # It was restored from a backup.
                self._at, self._at_revision = None, 0
            seen = revision or seen
            if not self._has_joined():
                return
            try:
                complete = await self._apply()
            except Problem as problem:
                complete, self._take_trouble = False, f"this host can't store what the fleet has: {problem.detail}"
            if not complete:
                await backoff.pause()
                continue
            self._take_trouble = None
            backoff.reset()
            if self._mirror.revision == revision:
                await self._mirror.changed()

    async def _apply(self) -> bool:
        """Applies missing changes to the journal; returns whether it is complete. :raises Problem:"""
        async with self._taking:
            mirror = self._mirror
            if mirror.revision < self._at_revision or not self._has_joined():
                # It is behind this host's own change, or lists again.
                return True
            change, revision = _id_of(mirror.section(AGREED).get("")), mirror.revision
            if change == self._at:
                self._at_revision = revision
                return True
            changes = self._differences()
            left = await self._clear_before(changes)
            kept = {place: each for place, each in changes.items() if place not in left}
            if kept:
                await self._take(kept)
            await self._clear_after(kept)
            if not left:
                self._arrive(change, revision)
            return not left

    def _differences(self) -> dict[str, Definition | None]:
        """Returns the changes that make the journal equal to the mirror."""
        here, there = definitions_of(self._store), self._mirror.section("shared")
        changes: dict[str, Definition | None] = {}
        unreadable = []
        for place, entry in there.items():
            own = here.get(place)
            if own is not None and encode_definition(own) == entry.value:
                continue
            try:
                definition = read_definition(place, entry.value)
            except BadRow as bad:
                unreadable.append(place)
                _logger.error("etcd has a definition that this host can't read: %s", bad)
                continue
            if own is None or without_use(own) != definition:
                changes[place] = definition
        for place in here:
            # TCP stays closed.
            if place not in there and place != KEYS_REQUIRED:
                changes[place] = None
        self._unreadable = tuple(unreadable)
        return changes

    async def _clear_before(self, changes: Changes) -> set[str]:
        """Removes the remains of projects before new ones of the same names are created. Returns the places where that
        fails."""
        here = definitions_of(self._store)
        failed = set()
        for place, project in changes.items():
            if isinstance(project, Project):
                before = here.get(place)
                if isinstance(before, Project) and before.created_at == project.created_at:
                    continue
                try:
                    await self._clear(project.name)
                except Problem as problem:
                    self._take_trouble = problem.detail
                    failed.add(place)
        return failed

    async def _clear_after(self, changes: Changes) -> None:
        for place, definition in changes.items():
            kind, _, name = place.partition("/")
            if kind == "project" and definition is None:
                try:
                    await self._clear(name.rpartition("/")[2])
                except Problem as problem:
                    # It is tried again before a project of that name comes.
                    _logger.warning("a deleted project has left something: %s", problem.detail)

    # Joining

    def _has_joined(self) -> bool:
        """Returns whether the fleet has this host's definitions from its join. That holds even after this host has
        left: definitions deleted in the meantime do not return."""
        return self._id in self._mirror.section("joined")

    async def _join(self) -> None:
        """Adds definitions that only this host has to the fleet, the first time; afterwards only the fleet decides."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        while not self._has_joined():
            try:
                if self._mirror.revision and self._mirror.trouble is None:
                    await self._give_part()
                    backoff.reset()
                    self._join_trouble = None
                    continue
            except (EtcdError, Problem) as error:
                self._join_trouble = error.detail if isinstance(error, Problem) else str(error)
            await backoff.pause()
        self._join_trouble = None
        self.joined.set()

    async def _give_part(self) -> None:
        """Adds a part of the missing definitions to the fleet.

        :raises Problem: 409, a definition here and one of the fleet exclude each other; 503 :raises EtcdError:
        """
        mirror = self._mirror
        newest = mirror.section(AGREED).get("")
        here, there = definitions_of(self._store), mirror.section("shared")
        clashing = obstacle(here, there)
        if clashing is not None:
            raise clashing
        missing = {place: each for place, each in sorted(here.items()) if place not in there}
        part = first_part(missing)
        steps = _steps(part)
        if len(part) == len(missing):
            # Objects with the same name are equal. If they were taken later, they would look newly created.
            same = {place: each for place, each in self._differences().items() if each is not None and place in here}
            await self._take(same)
            steps.append(put(JOINED + self._id, self._host.encode()))
        made = await self._agreement.make(newest, steps)
        with trio.move_on_after(_CATCH_UP_S if made is not None else _AGAIN_S):
            while made is None or mirror.revision < made[1]:
                await mirror.changed()


def _steps(changes: Changes) -> list[Step]:
    return [
        delete(SHARED_KEYS + place) if each is None else put(SHARED_KEYS + place, encode_definition(each))
        for place, each in changes.items()
    ]


def _number(entry: Entry | None) -> int:
    # etcd counts in 64 bits.
    return int(entry.value) if entry is not None and len(entry.value) < 20 and entry.value.isdigit() else 0


def _id_of(entry: Entry | None) -> bytes:
    """Returns the id of the newest change; empty if there is none."""
    return b"" if entry is None else entry.value
