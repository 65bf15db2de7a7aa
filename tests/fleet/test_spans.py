"""Lists of a fleet, with hosts that do not answer as they should."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import msgspec
import trio

from volant.fleet import OLDEST, Member, PeerAnswer
from volant.model import Caller
from volant.operations._parameters import Integer
from volant.operations._results import Page
from volant.operations._spans import PageSpans, spanning


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
