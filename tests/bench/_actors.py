"""A message between two actors, beside a value through Trio's own memory channel."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from actors import ONE_FOR_ONE, Actor, Child, Ref, Request, Supervisor, handles, open_system

from ._figure import Figure, Pairs

ROUNDS = 7
MESSAGES = 10_000
BURST = 1000


@dataclass(frozen=True, slots=True)
class Get(Request[int]):
    """Answered with a number."""


@dataclass(frozen=True, slots=True)
class Note:
    """Answered with nothing."""


class Target(Actor):
    """Takes messages and does nothing with them."""

    mailbox = 2 * BURST

    @handles(Get)
    async def get(self, message: Get) -> int:
        return 1

    @handles(Note)
    async def note(self, message: Note) -> None:
        pass


async def actors() -> list[Figure]:
    """Messages a second: ask (with a deadline), tell one by one, tell in bursts."""
    sides: dict[str, Callable[[Ref[Target]], Awaitable[None]]] = {"ask": _ask, "tell": _tell, "burst": _burst}
    took = {name: Pairs() for name in sides}
    child = Child("target", Target)
    async with open_system(Supervisor(ONE_FOR_ONE, intensity=1, period_s=60, children=[child])) as system:
        ref = system["target"]
        for _ in range(ROUNDS):
            began = time.perf_counter()
            await _channel()
            bare = MESSAGES / (time.perf_counter() - began)
            for name, side in sides.items():
                began = time.perf_counter()
                await side(ref)
                took[name].ours.append(MESSAGES / (time.perf_counter() - began))
                took[name].bare.append(bare)
    return [
        Figure(
            f"actors_{name}", pairs.value, "messages/s", pairs.ratio,
            f"a memory channel's {pairs.other:.0f} sends, each received by another task",
        )
        for name, pairs in took.items()
    ]  # fmt: skip


async def _channel() -> None:
    send, receive = trio.open_memory_channel[int](64)

    async def take() -> None:
        async for _ in receive:
            pass

    async with receive, trio.open_nursery() as nursery:
        nursery.start_soon(take)
        async with send:
            for number in range(MESSAGES):
                await send.send(number)


async def _ask(ref: Ref[Target]) -> None:
    message = Get()
    for _ in range(MESSAGES):
        await ref.ask(message, timeout_s=5.0)


async def _tell(ref: Ref[Target]) -> None:
    message = Note()
    for _ in range(MESSAGES):
        ref.tell(message)
        await trio.lowlevel.checkpoint()
    await ref.ask(Get(), timeout_s=5.0)


async def _burst(ref: Ref[Target]) -> None:
    message = Note()
    for _ in range(MESSAGES // BURST):
        for _ in range(BURST):
            ref.tell(message)
        await ref.ask(Get(), timeout_s=5.0)
