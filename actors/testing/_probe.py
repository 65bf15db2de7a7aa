"""Replaces an actor, to test another one alone.

A probe is an actor in its own small system. Its `Ref` is a real one for `ask`, `tell` and `monitor`; only the handlers
belong to the test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Generic, TypeVar, final

import trio

from .._actor import Actor
from .._cell import Child
from .._mailbox import Deferred
from .._message import Request
from .._ref import Ref
from .._supervisor import Backoff, DynamicSupervisor
from .._system import System, open_system

A = TypeVar("A", bound=Actor)
M = TypeVar("M")
R = TypeVar("R")


@final
class Probe(Generic[A]):
    """Replaces an actor of class `A`: receives its messages, keeps them, and answers according to the test.

    It has no public constructor: `open_probe` makes it.
    """

    def __init__(self, stands_for: type[A], name: str, system: System, supervisor: DynamicSupervisor) -> None:
        self._stands_for = stands_for
        self._name = name
        self._system = system
        self._supervisor = supervisor
        self._messages: list[object] = []
        self._untaken: list[object] = []
        self._owed: list[tuple[object, Deferred[Any]]] = []
        self._scripts: dict[type, Callable[[Any], object]] = {}
        self._arrived = trio.Event()
        self._born = trio.Event()
        self._child = Child(name, self._incarnation)

    @property
    def ref(self) -> Ref[A]:
        """The ref for the actor under test. It stays the same when the probe crashes and restarts."""
        return self._child.ref  # type: ignore[return-value]  # it takes the messages that A takes

    @property
    def messages(self) -> list[object]:
        """All messages so far, in order."""
        return list(self._messages)

    def answer(self, message: type[Request[R]], how: R | Callable[[Any], R | Exception] | Exception) -> None:
        """Answers requests of this type at once from now on. Other requests wait for `reply`.

        :param how: the answer; or an exception, which is raised in the asker; or a function of the message that returns
            one of the two.
        """
        self._scripts[message] = how if callable(how) else lambda _: how

    async def expect(self, message: type[M], *, timeout_s: float = 10.0) -> M:
        """Waits for a message of this type and takes it, the oldest first.

        :raises AssertionError: none arrived within `timeout_s` seconds; the text names the messages that did.
        """
        with trio.move_on_after(timeout_s):
            while True:
                for number, candidate in enumerate(self._untaken):
                    if isinstance(candidate, message):
                        del self._untaken[number]
                        return candidate
                await self._arrived.wait()
        came = ", ".join(map(repr, self._untaken)) or "nothing"
        raise AssertionError(f"{self._name} got no {message.__qualname__} within {timeout_s:g} s, but {came}")

    async def expect_nothing(self, *, within_s: float) -> None:
        """Waits `within_s` seconds.

        :raises AssertionError: a message arrived, or was present, that no `expect` took.
        """
        with trio.move_on_after(within_s):
            while not self._untaken:
                await self._arrived.wait()
        if self._untaken:
            raise AssertionError(f"{self._name} should have got nothing, but got {self._untaken[0]!r}")

    def reply(self, message: Request[R], value: R) -> None:
        """Answers a request that `expect` took.

        :raises LookupError: no task waits for its answer.
        """
        self._take_owed(message).reply(value)

    def refuse(self, message: Request[Any], error: Exception) -> None:
        """Raises `error` in the asker of a request that `expect` took.

        :raises LookupError: no task waits for its answer.
        """
        self._take_owed(message).fail(error)

    async def crash(self, error: Exception | None = None) -> None:
        """Crashes with `error` and restarts, as under a supervisor. Askers and monitors are notified."""
        actor = self._child._cell.actor
        assert actor is not None
        self._born = trio.Event()
        actor.ctx.spawn(_raise, error or RuntimeError("the test made the probe crash"))
        await self._born.wait()

    async def stop(self) -> None:
        """Stops without a restart: from now on its ref is down."""
        await self._supervisor.stop_child(self._name)

    def _take_owed(self, message: object) -> Deferred[Any]:
        for number, (owed, deferred) in enumerate(self._owed):
            if owed is message:
                del self._owed[number]
                return deferred
        raise LookupError(f"nobody waits for an answer of {self._name} to {message!r}")

    def _incarnation(self) -> Actor:
        return _StandIn(self)

    def _take(self, actor: Actor, message: object) -> Any:
        self._messages.append(message)
        self._untaken.append(message)
        arrived, self._arrived = self._arrived, trio.Event()
        arrived.set()
        if not isinstance(message, Request):
            return None
        deferred = actor.ctx.defer(message)
        script = self._scripts.get(type(message))
        if script is None:
            self._owed.append((message, deferred))
        else:
            outcome = script(message)
            if isinstance(outcome, Exception):
                deferred.fail(outcome)
            else:
                deferred.reply(outcome)
        return deferred


class _StandIn(Actor):
    mailbox = 1024

    def __init__(self, probe: Probe[Any]) -> None:
        async def handle(actor: Actor, message: object) -> Any:
            return probe._take(actor, message)

        self._probe = probe
        handled: Mapping[type, Any] = probe._stands_for._handlers
        self._handlers = dict.fromkeys(handled, handle)  # type: ignore[misc]  # each probe has its own

    async def on_start(self) -> None:
        self._probe._owed.clear()
        self._probe._born.set()


async def _raise(error: Exception) -> None:
    raise error


@asynccontextmanager
async def open_probe(stands_for: type[A], *, name: str = "") -> AsyncIterator[Probe[A]]:
    """Runs a probe that takes the messages that actors of class `stands_for` handle, during the block.

    `name` is the name of its ref; the default is the name of the class.
    """
    name = name or stands_for.__qualname__.rpartition(".")[2]
    supervisor = DynamicSupervisor(intensity=1_000_000, backoff=Backoff(base_s=0.0, cap_s=0.0))
    async with open_system(supervisor, rng=Random(0), name=f"probe {name}") as system:
        probe = Probe(stands_for, name, system, supervisor)
        await supervisor.start_child(probe._child)
        yield probe
