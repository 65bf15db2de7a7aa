"""Operations whose result combines all hosts of the fleet.

Each host answers the same operation for its own part. Without a limit all hosts are asked at once. With a limit they
are asked in the order of their numbers, as many at a time as are likely to fill the page; a cursor consists of the
host's number and that host's own cursor.

A host that does not answer delays the others by a few seconds at most, and is named in `Context.missing_hosts`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from types import GenericAlias
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import parse_qs, urlencode, urlsplit

import msgspec
import trio

from volant.http import first_problem
from volant.model import EventId, Problem, invalid

from ._context import Context
from ._parameters import QueryParameter
from ._results import Page

if TYPE_CHECKING:
    # Few hosts are in a fleet.
    from volant.fleet import Fleet, Keep, Member, PeerAnswer

T = TypeVar("T")

_ASK_S = 5.0
_AT_ONCE = 32
_CURSORS = 10**12
"""More than any cursor of one host, as ids of VMs have at most 12 digits."""
_logger = logging.getLogger("volant.api")

Part = tuple["Member", T]


class Spans(Generic[T]):
    """Joins the results of hosts. This class is for plain lists without pages."""

    def __init__(self, of: Any, key: Any) -> None:
        """Creates it.

        :param of: the type of an item
        :param key: the sort key of the list"""
        self._of = of
        self._key = key

    def read(self, answer: PeerAnswer) -> Any:
        """Returns the result of another host. :raises msgspec.MsgspecError:"""
        return msgspec.json.decode(answer.body, type=GenericAlias(list, self._of))

    def last_known(self, context: Context, fleet: Fleet, host: str, parameters: Mapping[str, Any]) -> Any:
        """Returns the last known data of a host that does not answer; None if there is none."""
        return None

    def size(self, result: Any) -> int:
        """Returns the number of items."""
        return len(result)

    def next_cursor(self, result: Any) -> Any:
        """Returns the host's cursor for its next page; None if this is its last page."""
        return None

    def join(self, parts: Sequence[Part[Any]], next_cursor: Any, whole: bool, fleet: Fleet) -> Any:
        """Returns the result of all hosts.

        :param parts: in the order of the hosts' numbers
        :param next_cursor: for the whole list; None if this is the last page
        :param whole: whether all hosts were asked from their beginnings
        """
        return sorted((item for _, result in parts for item in result), key=self._key)


class PageSpans(Spans[Any]):
    """Joins lists that are divided into pages."""

    def __init__(
        self,
        of: Any,
        cursor: Callable[[Any], int],
        last_known: Callable[[Context, Fleet, str, Mapping[str, Any]], Page[Any]],
    ) -> None:
        """Creates it.

        :param cursor: returns the cursor after an item, on its host"""
        super().__init__(of, cursor)
        self._last_known = last_known

    def read(self, answer: PeerAnswer) -> Page[Any]:
        items = super().read(answer)
        link = answer.headers.get(b"link", b"").decode("latin-1")
        found = parse_qs(urlsplit(link[1:].partition(">")[0]).query).get("cursor") if link else None
        return Page(
            items,
            len(items) if found is None else None,
            None if found is None else int(found[0]),
            answer.headers.get(b"volant-event-id", b"").decode("latin-1"),
            list(map(self._key, items)),
        )

    def last_known(self, context: Context, fleet: Fleet, host: str, parameters: Mapping[str, Any]) -> Page[Any]:
        return self._last_known(context, fleet, host, parameters)

    def size(self, result: Page[Any]) -> int:
        return len(result.items)

    def next_cursor(self, result: Page[Any]) -> int | None:
        return result.next_cursor

    def join(self, parts: Sequence[Part[Page[Any]]], next_cursor: Any, whole: bool, fleet: Fleet) -> Page[Any]:
        return Page(
            [item for _, page in parts for item in page.items],
            sum(page.total or 0 for _, page in parts) if whole else None,
            next_cursor,
            event_id_of(fleet, {member.number: page.event_id for member, page in parts}),
            [_cursor(member.number, each) for member, page in parts for each in page.cursors],
        )


def event_id_of(fleet: Fleet, known: Mapping[int, str]) -> str:
    """Returns the last event that a list of several hosts includes. For a host that was not asked, that is the last
    event it has reported: older rather than newer, so a client that follows events from there misses none."""
    from volant.fleet import position_text

    positions = {member.number: member.head for member in fleet.members()}
    for number, text in known.items():
        positions[number] = EventId.parse(text) or positions.get(number, EventId("", 0))
    return position_text(positions)


Call = Callable[..., Awaitable[Any]]


def spanning(call: Call, path: str, query: Mapping[str, QueryParameter], spans: Spans[Any]) -> Call:
    """Returns the operation `call` for all hosts of the fleet together; `path` and `query` belong to it."""

    defaults = {name: each.default for name, each in inspect.signature(call).parameters.items() if name in query}

    @wraps(call)
    async def everywhere(context: Context, **parameters: Any) -> Any:
        fleet = context.deps.fleet
        if fleet is None or not fleet.spans(context.scope):
            return await call(context, **parameters)
        with fleet.peers.keeping() as keep:
            asked = _Asked(context, fleet, call, path, query, spans, {**defaults, **parameters}, keep)
            if parameters.get("limit") is None:
                return await asked.whole()
            return await asked.page()

    return everywhere


class _Asked:
    """One call to all hosts."""

    def __init__(
        self,
        context: Context,
        fleet: Fleet,
        call: Call,
        path: str,
        query: Mapping[str, QueryParameter],
        spans: Spans[Any],
        parameters: dict[str, Any],
        keep: Keep,
    ) -> None:
        self._context = context
        self._fleet = fleet
        self._call = call
        self._path = path
        self._query = query
        self._spans = spans
        self._parameters = parameters
        self._keep = keep

    async def whole(self) -> Any:
        """Asks all hosts at once."""
        first, cursor = self._begin()
        members = [member for member in await self._fleet.known_members() if member.number >= first]
        parts = await self._ask(members, None, {first: cursor})
        return self._spans.join(parts, None, not first, self._fleet)

    async def page(self) -> Any:
        """Asks hosts in order, until the page is full."""
        first, cursor = self._begin()
        members = [member for member in await self._fleet.known_members() if member.number >= first]
        parts: list[Part[Any]] = []
        left = self._parameters["limit"]
        while members and left:
            asked = members[: _enough(members, left)]
            members = members[len(asked) :]
            for member, result in await self._ask(asked, left, {first: cursor}):
                taken = self._spans.size(result)
                if taken > left:
                    # Hosts before it had more than they had reported. It is asked again, for less.
                    members = [*(each for each in asked if each.number >= member.number), *members]
                    break
                parts.append((member, result))
                left -= taken
                after = self._spans.next_cursor(result)
                if after is not None:
                    return self._joined(parts, (member.number, after))
        return self._joined(parts, (members[0].number, _start(cursor)) if members else None)

    def _joined(self, parts: Sequence[Part[Any]], following: tuple[int, Any] | None) -> Any:
        return self._spans.join(parts, None if following is None else _cursor(*following), False, self._fleet)

    def _begin(self) -> tuple[int, Any]:
        """Returns the number of the first host, and its cursor. :raises Problem: 400, the cursor is malformed."""
        given = self._parameters.get("cursor")
        if isinstance(given, int):
            return divmod(given, _CURSORS)
        number, _, own = (given or "").partition(":")
        if number and not (number.isascii() and number.isdecimal() and len(number) < 6):
            raise invalid("cursor", f"{given!r:.80} is no cursor of this fleet", hint="begin without one")
        return int(number or 0), own

    async def _ask(self, members: Sequence[Member], limit: int | None, cursors: Mapping[int, Any]) -> list[Part[Any]]:
        """Returns the results of hosts, in their order: from a cursor on, or from the beginning."""
        found: dict[int, Any] = {}
        places = trio.CapacityLimiter(_AT_ONCE)

        async def ask(member: Member) -> None:
            async with places:
                parameters = dict(self._parameters)
                if "cursor" in parameters:
                    start = _start(parameters["cursor"])
                    parameters |= {"limit": limit, "cursor": cursors.get(member.number, start)}
                result = await self._ask_one(member, parameters)
                if result is None:
                    self._context.missing_hosts.add(member.name)
                    result = self._spans.last_known(self._context, self._fleet, member.name, parameters)
                if result is not None:
                    found[member.number] = result

        failure = None
        try:
            async with trio.open_nursery() as nursery:
                for member in members:
                    nursery.start_soon(ask, member)
        except* Problem as group:
            # This host refuses the request.
            failure = first_problem(group)
        if failure is not None:
            raise failure
        return [(member, found[member.number]) for member in members if member.number in found]

    async def _ask_one(self, member: Member, parameters: Mapping[str, Any]) -> Any:
        """Returns the result of a host; None if it gives none."""
        if member.name == self._fleet.host:
            return await self._call(self._context, **parameters)
        from volant.fleet import request_headers

        pairs = [
            (parameter.name or name, text)
            for name, parameter in self._query.items()
            for text in parameter.texts(parameters[name])
        ]
        target = f"{self._path}?{urlencode(pairs)}" if pairs else self._path
        headers = request_headers(self._context.scope)
        try:
            answer = await self._fleet.peers.ask(member.name, target, headers, timeout_s=_ASK_S, keep=self._keep)
            if answer.status == 200:
                result = self._spans.read(answer)
                limit = parameters.get("limit")
                # It would be asked again for less, without end.
                if limit is not None and self._spans.size(result) > limit:
                    raise ValueError(f"it has more than {limit} items")
                return result
            why = f"it answers with {answer.status}"
        except Problem as problem:
            why = problem.detail
        except (msgspec.MsgspecError, ValueError) as error:
            why = f"its answer can't be read: {error}"
        if member.is_up:
            _logger.warning("host %s is missing in a list: %s", member.name, why)
        return None


def _enough(members: Sequence[Member], wanted: int) -> int:
    """Returns how many hosts to ask at once, so that together they have as many items as are wanted, by their last
    reports."""
    number = 0
    while number < min(len(members), _AT_ONCE):
        wanted -= members[number].vms
        number += 1
        if wanted <= 0:
            break
    return number


def _cursor(number: int, own: Any) -> Any:
    return number * _CURSORS + own if isinstance(own, int) else f"{number}:{own}"


def _start(cursor: Any) -> Any:
    """Returns the cursor of a host's first page."""
    return type(cursor)()
