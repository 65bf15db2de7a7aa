"""The daemon's connection to one guest's agent: the channel, requests over it, and the protocol both speak."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, TypeGuard

import msgspec
import trio

from volant.channel import Address, AgentClient, AgentProtocolError, AgentUnreachable, Channel, ParkedLink, open_channel
from volant.host import Host
from volant.model.agent import HEALTHZ, INFO, PROTOCOL_MIN, PROTOCOL_VERSION

ANSWER_S = 10.0
IDENTITY_S = 15.0
"""The deadline for an identity. The agent waits 6 s for a copied workload to be healthy."""
DETAIL_CHARACTERS = 1000
_OPEN_S = 1.0
_LIMITED_S = 5.0
"""The maximum time in `limited`. A guest that answers needs a small part of it, even on a busy host."""


class WorkloadNotHealthy(AgentProtocolError):
    """The workload of a clone is not healthy."""


class NoSuchRoute(AgentProtocolError):
    """The agent is too old for the request."""


class AgentConnection:
    """The connection to one agent. It exists while a task is in `open`."""

    def __init__(
        self, host: Host, address: Address, *, take_link: Callable[[], ParkedLink | None], paused: bool = False
    ) -> None:
        """`take_link` returns an existing link to the agent."""
        self._host = host
        self._address = address
        self._take_link = take_link
        self._paused = paused
        self._opened = trio.Event()
        self._channel: Channel | None = None
        self._protocol: int | None = None
        self.client: AgentClient | None = None
        """Set while the channel is open, whether or not the agent answers."""
        self.incompatible: str | None = None
        """The reason why the daemon can't communicate with the agent, although the agent answers."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Opens the channel for a block. The channel connects again by itself whenever its link breaks."""
        async with open_channel(self._host, self._address, self._take_link()) as channel:
            self._channel = channel
            channel.set_paused(self._paused)
            self.client = AgentClient(channel)
            self._opened.set()
            try:
                yield
            finally:
                self._channel = self.client = None

    @property
    def link(self) -> int | None:
        """The number of the channel's link; None if there is none. The agent is the same as long as the number is."""
        return None if self._channel is None else self._channel.link

    @property
    def protocol(self) -> int | None:
        """The protocol agreed on with the agent; None before."""
        return self._protocol

    def inspect(self) -> dict[str, object]:
        """Returns figures, ready for JSON."""
        channel = self._channel
        return {
            "channel": None if channel is None else msgspec.to_builtins(channel.statistics()),
            "protocol": self._protocol,
            "incompatible": self.incompatible,
        }

    def set_paused(self, paused: bool) -> None:
        """Records whether the guest is paused. Requests wait while it is."""
        self._paused = paused
        if self._channel is not None:
            self._channel.set_paused(paused)

    async def channel(self, within_s: float = _OPEN_S) -> Channel:
        """Returns the channel once it is open. :raises AgentUnreachable: it is not, within `within_s` seconds."""
        with trio.move_on_after(within_s):
            await self._opened.wait()
        if self._channel is None:
            raise AgentUnreachable("the channel to the guest is not open")
        return self._channel

    async def ready(self) -> None:
        """Returns once the agent is connected and the guest is not paused. Has no deadline.

        :raises AgentUnreachable: the channel is closed.
        """
        await self._opened.wait()
        await (await self.channel()).ready()

    async def ask(self, method: str, path: str, body: object = None, *, also: Collection[int] = ()) -> None:
        """Sends one request of the daemon. Success statuses are accepted, and the statuses in `also`.

        :raises AgentUnreachable: the agent can't be reached.
        :raises AgentProtocolError: the agent refuses, or sends an invalid answer.
        """
        await self.channel()
        answer = await self._client().request_json(method, path, body, timeout_s=ANSWER_S)
        if not 200 <= answer.status < 300 and answer.status not in also:
            raise AgentProtocolError(f"it answers {method} {path} with {answer.status}: {detail_of(answer.body)}")

    async def get(self, path: str, timeout_s: float) -> dict[str, Any]:
        """Returns the object that a `GET` is answered with; an empty one for any status but 200.

        :raises AgentUnreachable: :raises AgentProtocolError:
        """
        answer = await self._client().request_json("GET", path, timeout_s=timeout_s)
        return answer.body if answer.status == 200 and isinstance(answer.body, dict) else {}

    async def put(self, path: str, body: object) -> dict[str, Any]:
        """Returns the answer to a `PUT`, in which `time_ns` is what the guest's clock shows.

        :raises AgentUnreachable: :raises AgentProtocolError: NoSuchRoute and WorkloadNotHealthy among them.
        """
        answer = await self._client().request_json("PUT", path, body, timeout_s=IDENTITY_S)
        found = answer.body if isinstance(answer.body, dict) else {}
        if answer.status == 404:
            raise NoSuchRoute(f"its agent does not know {path}")
        if answer.status == 503:
            raise WorkloadNotHealthy(f"it answers PUT {path}: {detail_of(found)}")
        if answer.status != 200 or not _is_number(found.get("time_ns")):
            raise AgentProtocolError(f"it answers PUT {path} with {answer.status}: {detail_of(found)}")
        return found

    async def try_put(self, path: str, body: object, timeout_s: float) -> tuple[int, str]:
        """Returns the status of the answer to a `PUT`, and the guest's own words on what went wrong.

        :raises AgentUnreachable: :raises AgentProtocolError:
        """
        answer = await self._client().request_json("PUT", path, body, timeout_s=timeout_s)
        return answer.status, detail_of(answer.body)

    async def negotiate(self) -> int:
        """Agrees on the newest protocol that both sides speak, and returns it.

        :raises AgentUnreachable: the agent can't be reached.
        :raises AgentProtocolError: there is no such protocol, or the agent answers with nonsense.
        """
        answer = await self._client().request_json("GET", INFO, timeout_s=ANSWER_S)
        offered = answer.body.get("protocol") if isinstance(answer.body, dict) else None
        # Only the oldest agents have no such route.
        return self._agree(*((1, 1) if answer.status == 404 else _range(offered)))

    def agree(self, offered: object) -> int:
        """Agrees on a protocol with an agent that says which ones it speaks. :raises AgentProtocolError: as above."""
        return self._agree(*_range(offered))

    def _agree(self, oldest: int, newest: int) -> int:
        self.incompatible = self._protocol = None
        if oldest > PROTOCOL_VERSION or newest < PROTOCOL_MIN:
            ours = f"{PROTOCOL_MIN} to {PROTOCOL_VERSION}"
            self.incompatible = f"its agent speaks the protocols {oldest} to {newest}, this daemon {ours}"
            raise AgentProtocolError(self.incompatible)
        self._protocol = min(newest, PROTOCOL_VERSION)
        return self._protocol

    @asynccontextmanager
    async def limited(self, limiter: trio.CapacityLimiter) -> AsyncIterator[None]:
        """A block that few guests may be in at a time.

        A guest that hangs must not delay the others: it has to answer before it queues, and leaves after `_LIMITED_S`.

        :raises AgentUnreachable: it does not answer, or takes too long. :raises AgentProtocolError: it answers nonsense
        """
        await self.ready()
        await self.ask("GET", HEALTHZ)
        async with limiter:
            with trio.move_on_after(_LIMITED_S) as scope:
                yield
        if scope.cancelled_caught:
            raise AgentUnreachable(f"the agent was not done within {_LIMITED_S:g} s, and others wait")

    def _client(self) -> AgentClient:
        if self.client is None:
            raise AgentUnreachable("the channel to the guest is not open")
        return self.client


def detail_of(body: object) -> str:
    """Returns a guest's error text, cut to a readable length, for rows, events and logs."""
    return str(body.get("detail"))[:DETAIL_CHARACTERS] if isinstance(body, dict) else ""


def _range(offered: object) -> tuple[int, int]:
    if isinstance(offered, dict):
        oldest, newest = offered.get("min"), offered.get("max")
        if _is_number(oldest) and _is_number(newest) and oldest <= newest:
            return oldest, newest
    raise AgentProtocolError("it does not say which protocols it speaks")


def _is_number(value: object) -> TypeGuard[int]:
    """Returns whether a value is a number that an agent may send. Numbers in JSON may have thousands of digits."""
    return type(value) is int and 0 <= value < 2**63
