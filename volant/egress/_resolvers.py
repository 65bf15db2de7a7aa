"""Runs the resolvers: a port for each VM, which identifies its queries, so one VM fills only its own buffers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from volant.network import EgressGuest

from ._messages import MalformedMessage, read_query
from ._resolver import Allow, DeniedName, Resolver
from ._sockets import DnsListener, DnsSockets, Sender, read_exactly
from ._upstream import Upstream

_MAX_QUERY = 1232
"""Maximum size of a query, which has one name of at most 255 bytes and EDNS options."""
_THROTTLE_S = 0.004
"""Pause after each query and connection of a VM. So a VM that floods its resolver uses a few percent of the daemon's
time."""
_CONNECTIONS = 4
"""Maximum TCP connections per VM."""
_PER_CONNECTION = 32
"""Maximum queries per TCP connection."""
_IDLE_S = 10.0
_RETRY_S = 1.0

Send = Callable[[bytes], Awaitable[None]]
_logger = logging.getLogger("volant.egress")


class VmResolvers:
    """The resolvers of one daemon; see `Resolvers`."""

    def __init__(self, sockets: DnsSockets, servers: tuple[str, ...], allow: Allow) -> None:
        """Creates it. `servers` are the DNS servers to ask."""
        self._sockets = sockets
        self._upstream = Upstream(sockets, servers)
        self._allow = allow
        self._running: dict[int, _Running] = {}
        self._nursery: trio.Nursery | None = None

    async def open(self, guest: EgressGuest) -> int:
        running = self._running.get(guest.vm_id)
        if running is not None and running.guest != guest:
            self.close(guest.vm_id)
            running = None
        if running is None:
            listener = await self._sockets.listen(guest.listens_at)
            running = _Running(guest, listener, Resolver(guest, self._upstream, self._allow))
            self._running[guest.vm_id] = running
            if self._nursery is not None:
                self._nursery.start_soon(running.serve)
        return running.listener.port

    def close(self, vm_id: int) -> None:
        running = self._running.pop(vm_id, None)
        if running is not None:
            running.stop()

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answers queries, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for running in self._running.values():
                    nursery.start_soon(running.serve)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def denied_names(self, vm_id: int) -> list[DeniedName]:
        """Returns the names that a VM recently could not resolve, newest first."""
        running = self._running.get(vm_id)
        return [] if running is None else list(reversed(running.resolver.denied.values()))

    def denied_counts(self) -> dict[int, int]:
        """Returns the number of denied or failed DNS queries, by VM, since the daemon started."""
        return {vm_id: running.resolver.denied_count for vm_id, running in self._running.items()}


class _Running:
    """The resolver of one VM with its sockets."""

    def __init__(self, guest: EgressGuest, listener: DnsListener, resolver: Resolver) -> None:
        self.guest = guest
        self.listener = listener
        self.resolver = resolver
        self._scope = trio.CancelScope()
        self._connections = trio.Semaphore(_CONNECTIONS)
        self._throttling = trio.Lock()
        self._is_serving = False
        self._stopped = trio.Event()
        self._has_failed = False

    def stop(self) -> None:
        """Ends `serve`, and closes the sockets."""
        self._stopped.set()
        self._scope.cancel()
        if not self._is_serving:
            self.listener.close()

    async def serve(self) -> None:
        if self._stopped.is_set():
            return
        self._is_serving = True
        try:
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._serve_udp, nursery)
                    nursery.start_soon(self._serve_tcp, nursery)
        finally:
            self._is_serving = False
            if self._stopped.is_set():
                # Not before its tasks have ended: one of them may be about to use the sockets.
                self.listener.close()

    async def _serve_udp(self, nursery: trio.Nursery) -> None:
        async def serve(data: bytes, send: Send) -> None:
            later = await self._answer(data, send, tcp=False)
            if later is not None:
                nursery.start_soon(self._safely, later)

        while True:
            try:
                data, sender = await self.listener.receive()
            except OSError as error:
                _logger.warning("VM %d: its resolver receives nothing: %s", self.guest.vm_id, error)
                await trio.sleep(_RETRY_S)
                continue
            if self._is_ours(sender):
                await self._safely(partial(serve, data, partial(self.listener.send, to=sender)))
            await self._throttle()

    async def _serve_tcp(self, nursery: trio.Nursery) -> None:
        while True:
            await self._connections.acquire()
            try:
                stream, sender = await self.listener.accept()
            except OSError as error:
                self._connections.release()
                _logger.warning("VM %d: its resolver accepts no connection: %s", self.guest.vm_id, error)
                await trio.sleep(_RETRY_S)
                continue
            except BaseException:
                self._connections.release()
                raise
            nursery.start_soon(self._serve_connection, stream, sender)
            await self._throttle()

    async def _serve_connection(self, stream: trio.abc.Stream, sender: Sender) -> None:
        async def serve() -> None:
            for _ in range(_PER_CONNECTION if self._is_ours(sender) else 0):
                with trio.fail_after(_IDLE_S):
                    data = await _read(stream)
                if data is None:
                    return
                later = await self._answer(data, partial(_write, stream), tcp=True)
                if later is not None:
                    await later()
                await self._throttle()

        try:
            async with stream:
                await self._safely(serve)
        finally:
            self._connections.release()

    async def _throttle(self) -> None:
        """Pauses, one task after the other, so that all connections of a VM share its limit."""
        async with self._throttling:
            await trio.sleep(_THROTTLE_S)

    async def _answer(self, data: bytes, send: Send, *, tcp: bool) -> Callable[[], Awaitable[None]] | None:
        """Answers a query, or returns a function that answers it later. Other data gets no answer."""
        if len(data) > _MAX_QUERY:
            return None
        try:
            query = read_query(data)
        except MalformedMessage:
            return None
        answer = self.resolver.answer_now(query, tcp=tcp)
        if answer is None:
            return partial(self.resolver.answer_later, query, send, tcp=tcp)
        await send(answer)
        return None

    async def _safely(self, serve: Callable[[], Awaitable[None]]) -> None:
        """Serves a query or a connection. A bug triggered by a query affects no other VM."""
        try:
            await serve()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # The guest has given up, or does not read.
        except Exception:
            if not self._has_failed:
                _logger.exception("VM %d: a DNS query can't be answered", self.guest.vm_id)
            self._has_failed = True

    def _is_ours(self, sender: Sender) -> bool:
        """Returns whether a packet comes from the guest. A passt sends from an address of the host."""
        return not self.guest.address or sender[0] == self.guest.address


async def _read(stream: trio.abc.Stream) -> bytes | None:
    """Returns the next message; None at the end, or if it is too long."""
    try:
        length = int.from_bytes(await read_exactly(stream, 2))
        return await read_exactly(stream, length) if length <= _MAX_QUERY else None
    except ConnectionResetError:
        return None


async def _write(stream: trio.abc.Stream, data: bytes) -> None:
    with trio.fail_after(_IDLE_S):
        await stream.send_all(len(data).to_bytes(2) + data)
