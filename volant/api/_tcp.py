"""`/ws/v1/vms/{name}/tcp/{port}`: one TCP connection to a port of a guest's loopback, as a WebSocket.

Binary messages are the bytes, however they are cut. WebSocket has no half close, and much that speaks TCP needs one
(`nc`, rsync, a request that ends with its sender's end), so **an empty message is the end of one direction**, as in the
streams of exec. Closing the WebSocket after the end of one direction only, as websockify and Kubernetes' port forward
do, was rejected: it cuts off the answer of whoever was asked.

Messages are decoded here, unlike those of relays: the guest's end speaks no WebSocket.
"""

from __future__ import annotations

import re
from functools import partial

import trio

from volant.channel import ChannelStream
from volant.concurrency import FairShare
from volant.http import GOING_AWAY, NORMAL, Call, StreamRoute, interruptible
from volant.operations import ApiDeps, find_vm
from volant.relay import open_port, parse_port

PROTOCOL_ERROR = 1002
UNSUPPORTED = 1003
BROKEN = 1011

_PATH = re.compile(r"/ws/v1/vms/([^/]*)/tcp/([^/]*)/?\Z")
_PIECE = 64 * 1024
_SEND_S = 300.0
"""How long a guest may take to accept a message."""


def routes(deps: ApiDeps, share: FairShare) -> list[StreamRoute]:
    """The routes of this resource."""

    async def tcp(call: Call) -> None:
        name = call.args[0]
        port = parse_port(call.args[1])
        call.query(credentials=True).done()
        row = find_vm(deps, name)
        async with open_port(deps.vms.streams.agent(name), name, port) as stream:
            await call.accept()
            await _Session(call, share, row.id, stream).run()

    return [StreamRoute(_PATH, tcp, http=False, websocket=True)]


class _Session:
    """One connection, both ways."""

    def __init__(self, call: Call, share: FairShare, vm_id: int, stream: ChannelStream) -> None:
        self._call = call
        self._share = share
        self._vm_id = vm_id
        self._stream = stream
        self._over = trio.Event()
        self._ending: tuple[int, str] | None = None
        self._left = False
        self._client_ended = trio.Event()

    async def run(self) -> None:
        """Until both directions have ended, or something breaks."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_on_stop)
            nursery.start_soon(self._to_guest, nursery.cancel_scope)
            await self._to_client()
            nursery.cancel_scope.cancel()
        if not self._left:
            await self._call.close(*(self._ending or (NORMAL, "")))

    def _end(self, code: int, reason: str) -> None:
        if self._ending is None:
            self._ending = code, reason
            self._over.set()

    async def _end_on_stop(self) -> None:
        await self._call.stopping.wait()
        self._end(GOING_AWAY, "the daemon stops")

    async def _to_client(self) -> None:
        receive = partial(self._stream.receive_some, _PIECE)
        async with interruptible(self._over) as waits:
            data: bytes | None = b"?"
            while data:
                try:
                    data = await waits.until(receive)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._end(BROKEN, "the connection in the guest broke")
                    return
                if data is None:
                    return
                await self._share.take(self._vm_id, len(data))
                await self._call.send_bytes(data)
            await waits.until(self._client_ended.wait)

    async def _to_guest(self, scope: trio.CancelScope) -> None:
        while (message := await self._call.receive())["type"] != "websocket.disconnect":
            if message["type"] != "websocket.receive" or self._ending is not None:
                continue
            data = message["bytes"]
            if data is None:
                self._end(UNSUPPORTED, "bytes come in binary messages")
            elif self._client_ended.is_set():
                self._end(PROTOCOL_ERROR, "an empty message was the end of this direction")
            else:
                await self._pass_on(data)
        self._left = True
        scope.cancel()

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
            self._end(BROKEN, "the connection in the guest broke")
        except trio.TooSlowError:
            self._end(BROKEN, f"the guest takes nothing for {_SEND_S:g} s")
