"""`/ws/v1/vms/{name}/tcp/{port}`: one TCP connection to a port of a guest's loopback, as a WebSocket.

Binary messages carry the data; their boundaries have no meaning. WebSocket has no half-close, and many TCP programs
need one (`nc`, rsync, a request that ends with the end of input), so **an empty message is the end of one direction**,
as in the streams of exec. Rejected: closing the WebSocket at the end of the first direction, like websockify and
Kubernetes' port forward, as it cuts off the answer.

Unlike in relays, messages are decoded here, as the guest's end is plain TCP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import trio

from volant.channel import ChannelStream
from volant.concurrency import FairShare
from volant.http import NORMAL, Call, StreamRoute, interruptible
from volant.operations import ApiDeps, enter
from volant.relay import open_port, parse_port

from ._session import Session, moved

PROTOCOL_ERROR = 1002
UNSUPPORTED = 1003
BROKEN = 1011

_PATH = re.compile(r"/ws/v1/vms/([^/]*)/tcp/([^/]*)/?\Z")
_PIECE = 64 * 1024
_SEND_S = 300.0
"""How long a guest may take to accept a message."""


def routes(deps: ApiDeps, share: FairShare) -> list[StreamRoute]:
    """Returns the routes of this resource."""

    async def tcp(call: Call) -> None:
        name = call.args[0]
        port = parse_port(call.args[1])
        call.query(credentials=True).done()
        row, client = await enter(deps, call.named(name), f"port {port}")
        elsewhere = moved(deps, row.id, row.key)
        async with open_port(client, name, port) as stream:
            await call.accept()
            await _Session(call, share, row.id, stream, elsewhere).run()

    return [StreamRoute(_PATH, tcp, http=False, websocket=True)]


class _Session(Session):
    """One connection, in both directions."""

    def __init__(
        self,
        call: Call,
        share: FairShare,
        vm_id: int,
        stream: ChannelStream,
        moved: Callable[[], tuple[int, str] | None],
    ) -> None:
        super().__init__(call)
        self._moved = moved
        self._share = share
        self._vm_id = vm_id
        self._stream = stream
        self._client_ended = trio.Event()

    async def send_all(self) -> None:
        receive = partial(self._stream.receive_some, _PIECE)
        async with interruptible(self.over) as waits:
            data: bytes | None = b"?"
            while data:
                try:
                    data = await waits.until(receive)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._end_broken()
                    return
                if data is None:
                    return
                await self._share.take(self._vm_id, len(data))
                await self.call.send_bytes(data)
            await waits.until(self._client_ended.wait)

    async def take(self, message: Mapping[str, Any]) -> None:
        data = message["bytes"]
        if data is None:
            self.end(UNSUPPORTED, "bytes come in binary messages")
        elif self._client_ended.is_set():
            self.end(PROTOCOL_ERROR, "an empty message was the end of this direction")
        else:
            await self._pass_on(data)

    def reason(self) -> tuple[int, str]:
        return NORMAL, ""

    async def _pass_on(self, data: bytes) -> None:
        await self._share.take(self._vm_id, len(data))
        try:
            with trio.fail_after(_SEND_S):
                if data:
                    await self._stream.send_all(data)
                else:
                    await self._stream.send_eof()
                    self._client_ended.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._end_broken()
        except trio.TooSlowError:
            self.end(BROKEN, f"the guest takes nothing for {_SEND_S:g} s")

    def _end_broken(self) -> None:
        self.end(*(self._moved() or (BROKEN, "the connection in the guest broke")))
