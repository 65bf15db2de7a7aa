"""Lists of a fleet: those of all hosts together, also with hosts that do not answer as they should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
import trio

from volant.fleet import OLDEST, Member, PeerAnswer, positions_in
from volant.model import Caller, Desired, EventId, Key, Problem, Status, VmRecord, VmView, unreachable_view
from volant.operations import TABLE
from volant.operations._parameters import Integer
from volant.operations._results import Page
from volant.operations._spans import PageSpans, spanning
from volant.operations.vms import _last_known


async def numbers(context: Any, *, limit: int | None = None, cursor: int = 0) -> Page[int]:
    return Page([1, 2], 2, None, "", [1, 2])


async def test_a_host_that_ignores_the_limit_is_missing_in_a_page() -> None:
    members = [Member(number=n, name=f"h{n}", is_up=True, vms=2, since=OLDEST, head=OLDEST) for n in (1, 2)]
    asked: list[str] = []

    async def ask(host: str, target: str, headers: Any, *, timeout_s: float, keep: Any) -> PeerAnswer:
        asked.append(host)
        await trio.lowlevel.checkpoint()
        return PeerAnswer(200, {}, msgspec.json.encode([1, 2, 3, 4]))

    async def known_members() -> Sequence[Member]:
        return members

    fleet = SimpleNamespace(
        host="h1", spans=lambda scope: True, members=lambda: members, known_members=known_members,
        peers=SimpleNamespace(ask=ask, keeping=lambda: nullcontext(len)),
    )  # fmt: skip
    state = {"caller": Caller("1", "key 1"), "request_id": "r1", "project": "default", "names_project": False}
    context: Any = SimpleNamespace(
        deps=SimpleNamespace(fleet=fleet), scope={"state": state, "headers": []}, missing_hosts=set()
    )
    spans = PageSpans(int, lambda number: number, lambda *given: Page([], 0, None, "", []))
    query: Any = {"limit": Integer(help="At most so many"), "cursor": Integer(help="Opaque")}
    everywhere = spanning(numbers, "/numbers", query, spans)
    with trio.fail_after(20):
        page = await everywhere(context, limit=3)
    assert page.items == [1, 2]
    assert page.next_cursor is None
    assert context.missing_hosts == {"h2"}
    assert asked == ["h2"]


MADE_AT = datetime(2026, 1, 1, tzinfo=UTC)
# h1 has more than it has reported last, and h3 fewer.
VMS = {"h1": "ad", "h2": "bef", "h3": "c"}
REPORTED = {"h1": 0, "h2": 2, "h3": 5}
ALL = [*"adbefc"]


def vms_of(host: str) -> list[VmView]:
    """Returns the VMs of a host as they were last known, by id."""
    return [
        unreachable_view(
            Key("default", name),
            VmRecord(
                host=host, id=ord(name), status=Status.RUNNING, desired=Desired.RUNNING, plugin="", runtime="",
                cpu_cores=1, memory_mb=128, labels={"on": host}, created_at=MADE_AT, updated_at=MADE_AT,
            ),
        )
        for name in VMS[host]
    ]  # fmt: skip


class ListingHosts:
    """Hosts that list their VMs in pages. `refusing`: those that do not answer the others"""

    def __init__(self) -> None:
        self.refusing: set[str] = set()
        self.members = [
            Member(
                number=number, name=name, is_up=True, vms=REPORTED[name], since=OLDEST,
                head=EventId(f"aa0{number}", 1),
            )
            for number, name in enumerate(VMS, 1)
        ]  # fmt: skip

    async def vms(
        self,
        context: Any,
        *,
        status: Sequence[str] = (),
        plugin: Sequence[str] = (),
        labels: Mapping[str, str] = {},
        limit: int | None = None,
        cursor: int = 0,
    ) -> Page[VmView]:
        """Returns what the host of a call has, as `list_vms` does."""
        await trio.lowlevel.checkpoint()
        host = context.deps.fleet.host
        fits = [msgspec.structs.replace(vm, unreachable=None) for vm in vms_of(host)]
        left = [vm for vm in fits if vm.id > cursor and labels.items() <= vm.labels.items()]
        page = left if limit is None else left[:limit]
        following = page[-1].id if len(page) < len(left) else None
        return Page(page, len(fits), following, f"aa0{host[1:]}-7", [vm.id for vm in page])

    async def listed(self, host: str, **parameters: Any) -> tuple[Page[VmView], set[str]]:
        """Asks a host for the list of all; returns it, and the hosts that are missing in it."""
        context = self._context(host)
        spans = PageSpans(VmView, lambda vm: vm.id, _last_known)
        everywhere = spanning(self.vms, "/api/v1/vms", TABLE["list_vms"].query, spans)
        given = {"status": (), "plugin": (), "labels": {}, **parameters}
        with trio.fail_after(20):
            return await everywhere(context, **given), context.missing_hosts

    async def pages(self, *hosts: str, limit: int) -> list[Page[VmView]]:
        """Returns all pages, each from the next one of these hosts."""
        found: list[Page[VmView]] = []
        cursor: int | None = 0
        while cursor is not None:
            page, missing = await self.listed(hosts[len(found) % len(hosts)], limit=limit, cursor=cursor)
            assert missing <= self.refusing
            found.append(page)
            assert len(found) <= len(ALL), "pages without end"
            cursor = page.next_cursor
        return found

    async def ask(self, host: str, target: str, headers: Any, *, timeout_s: float, keep: Any) -> PeerAnswer:
        """Answers another host."""
        if host in self.refusing:
            raise Problem(503, "host-unreachable", "it does not answer")
        query = {name: values[0] for name, values in parse_qs(urlsplit(target).query).items()}
        limit = int(query["limit"]) if "limit" in query else None
        labels = dict([query["label"].split("=")]) if "label" in query else {}
        page = await self.vms(self._context(host), labels=labels, limit=limit, cursor=int(query.get("cursor", 0)))
        answered = {b"volant-event-id": page.event_id.encode()}
        if page.next_cursor is not None:
            answered[b"link"] = f'</api/v1/vms?limit={limit}&cursor={page.next_cursor}>; rel="next"'.encode()
        return PeerAnswer(200, answered, msgspec.json.encode(page.items))

    def _context(self, host: str) -> Any:
        async def known_members() -> Sequence[Member]:
            await trio.lowlevel.checkpoint()
            return self.members

        fleet = SimpleNamespace(
            host=host, spans=lambda scope: True, members=lambda: self.members, known_members=known_members,
            last_known_of=vms_of, peers=SimpleNamespace(ask=self.ask, keeping=lambda: nullcontext(len)),
        )  # fmt: skip
        state = {"caller": Caller("1", "key 1"), "request_id": "r1", "project": "default", "names_project": False}
        return SimpleNamespace(
            deps=SimpleNamespace(fleet=fleet), scope={"state": state, "headers": []}, listed="default",
            missing_hosts=set(),
        )  # fmt: skip


def names(*pages: Page[VmView]) -> list[str]:
    return [vm.name for page in pages for vm in page.items]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7])
async def test_pages_of_any_size_and_from_any_host_are_the_list_of_all(limit: int) -> None:
    hosts = ListingHosts()
    for host in VMS:
        whole, missing = await hosts.listed(host)
        assert (names(whole), whole.total, missing) == (ALL, len(ALL), set())
        pages = await hosts.pages(host, limit=limit)
        assert names(*pages) == ALL
        assert all(len(page.items) == limit for page in pages[:-1])
        # Without an empty one at the end.
        assert len(pages) == -(-len(ALL) // limit)
    assert names(*await hosts.pages("h3", "h1", "h2", limit=limit)) == ALL


async def test_an_item_of_a_page_is_a_place_to_continue_at() -> None:
    hosts = ListingHosts()
    whole, _ = await hosts.listed("h1")
    for number, cursor in enumerate(whole.cursors, 1):
        rest, _ = await hosts.listed("h2", cursor=cursor)
        assert names(rest) == ALL[number:]


async def test_a_list_says_up_to_which_event_of_each_host_it_is_true() -> None:
    hosts = ListingHosts()
    whole, _ = await hosts.listed("h1")
    assert positions_in(whole.event_id) == {number: EventId(f"aa0{number}", 7) for number in (1, 2, 3)}
    # For hosts that were not asked, that is what they have reported last.
    last = (await hosts.pages("h1", limit=5))[-1]
    assert positions_in(last.event_id) == {1: EventId("aa01", 1), 2: EventId("aa02", 1), 3: EventId("aa03", 7)}


@pytest.mark.parametrize("refusing", ["h2", "h3"])
async def test_a_host_that_refuses_is_named_and_its_vms_are_shown_as_last_known(refusing: str) -> None:
    hosts = ListingHosts()
    hosts.refusing = {refusing}
    whole, missing = await hosts.listed("h1")
    assert (names(whole), missing) == (ALL, {refusing})
    assert {vm.name: vm.unreachable for vm in whole.items if vm.unreachable} == dict.fromkeys(VMS[refusing], refusing)
    for limit in (1, 2, 3, 5):
        assert names(*await hosts.pages("h1", limit=limit)) == ALL
    of_it, missing = await hosts.listed("h1", labels={"on": refusing})
    assert (names(of_it), missing) == ([*VMS[refusing]], {refusing})
    # It knows its own.
    assert (await hosts.listed(refusing))[1] == set()
