"""The data that one host sends another with a request: the caller, or the host of its ticket. Hosts trust each other by
their certificates.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable
from typing import Any

import msgspec
import trio

from volant.http import names_project
from volant.model import Caller, Problem

from ._peers import Peers

REDEEM = "/fleet/v1/tickets"
"""The path at the port for other hosts."""
_REDEEM_S = 5.0
_AT_ONCE = 16


class WantRedeemed(msgspec.Struct, frozen=True):
    """The body of a request to redeem a ticket; the answer is a `Caller`, or null."""

    ticket: str
    path: str
    """The path of the client's request."""


class TicketsOfOthers:
    """Redeems tickets at the hosts that issued them."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        # Anybody may send something that looks like a ticket.
        self._places = trio.CapacityLimiter(_AT_ONCE)

    async def redeem(self, host: str, ticket: bytes, path: str) -> Caller | None:
        """Returns the caller of a ticket, which is used up; None if it is not valid, or its host does not answer."""
        body = msgspec.json.encode(WantRedeemed(ticket.decode("latin-1"), path))
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        try:
            async with self._places:
                answer = await self._peers.ask(host, REDEEM, headers, timeout_s=_REDEEM_S, body=body)
            return msgspec.json.decode(answer.body, type=Caller | None) if answer.status == 200 else None
        except (Problem, msgspec.MsgspecError):
            return None


CALLER = b"volant-caller"
HOST = b"volant-host"
Header = tuple[bytes, bytes]


class Forwarded(msgspec.Struct, frozen=True, omit_defaults=True):
    """A client's request, as checked by the host that received it."""

    caller: Caller
    """The caller without credential and limits, which only that host needs."""
    credential: str = ""
    """The credential of the caller, for tickets: any host may receive the request with one."""
    address: tuple[bool, str] | None = None
    """The address of that host for the client, for URLs in answers: whether it uses TLS, and `host[:port]`."""


def request_headers(scope: Any, address: tuple[bool, str] | None = None) -> list[Header]:
    """Returns the headers for passing a request to another host: the caller, the project, and its id.

    :param address: see `Forwarded`
    """
    state = scope["state"]
    caller = state["caller"]
    forwarded = Forwarded(msgspec.structs.replace(caller, credential="", limited=False), caller.credential, address)
    headers = [
        (b"host", b"localhost"),
        (b"x-request-id", str(state["request_id"]).encode("ascii")),
        (CALLER, b64encode(msgspec.json.encode(forwarded))),
    ]
    if names_project(scope):
        headers.append((b"volant-project", str(state["project"]).encode()))
    return headers


def is_for_one_host(scope: Any) -> bool:
    """Returns whether a request is for one host: another host has passed it on, or it names a host."""
    return scope["state"].get("forwarded") is not None or any(name == HOST for name, _ in scope["headers"])


def forwarded_in(headers: Iterable[Header]) -> Forwarded:
    """Returns the client that another host reports. :raises Problem: 400, it names no caller, or several."""
    values = [value for name, value in headers if name == CALLER]
    if len(values) == 1:
        try:
            return msgspec.json.decode(b64decode(values[0], validate=True), type=Forwarded)
        except (msgspec.MsgspecError, ValueError):
            pass
    raise Problem(
        400, "no-caller", "a request to this port must come from another host of the fleet, and name one caller",
        hint="clients use the addresses of api_listen_addr",
    )  # fmt: skip
