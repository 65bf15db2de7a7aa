"""Servers of event streams, each in its own process, with a socket that makes them send events.

    python -m tests.bench._event_server ours CONTROL          # the API and its journal, which commits the events
    python -m tests.bench._event_server bare CONTROL BODY     # a bare ASGI app on Hypercorn

The bare one sends the content of the file BODY, the chunked body that a reader of the API received last: chunk by chunk
for `/alike`, and in pieces of whole events of about 64 KiB for `/bulk`.

Each prints its address, and serves until SIGTERM. A line with a number on the Unix socket CONTROL makes it send so many
events. Once all are committed or handed to Hypercorn, it answers with the figures of the process; the line 0 only asks
for these.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from tests.api.kit import api
from volant.http import Limits

from ._event_readers import dechunked
from ._journal import WRITERS, Writer

_PIECE = 64 * 1024

Pass = Callable[[int], Awaitable[None]]


async def ours(control: str) -> None:
    with tempfile.TemporaryDirectory(prefix="vb") as state:
        async with api(Path(state), limits=Limits()) as served:
            writers = [await Writer.create(served.deps.journal, f"vm{number}") for number in range(WRITERS)]

            async def commit(count: int) -> None:
                left = iter(range(count))

                async def write(writer: Writer) -> None:
                    for _ in left:
                        await writer.change()

                async with trio.open_nursery() as nursery:
                    for writer in writers:
                        nursery.start_soon(write, writer)

            await _obey(control, served.server.port, commit)


def _pieces(path: str) -> dict[str, list[bytes]]:
    """The pieces to send, by the path of the request."""
    chunks = dechunked(Path(path).read_bytes())
    bulk = [b""]
    for block in b"".join(chunks).split(b"\n\n")[:-1]:
        if len(bulk[-1]) + len(block) > _PIECE:
            bulk.append(b"")
        bulk[-1] += block + b"\n\n"
    return {"/alike": chunks, "/bulk": bulk}


async def bare(control: str, path: str) -> None:
    pieces: dict[str, list[bytes]] = {}
    passing = trio.Event()
    handed = trio.Semaphore(0)
    asked = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal asked, pieces
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        if not asked:
            pieces = _pieces(path)
        asked += 1
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"retry: 1000\n\n", "more_body": True})
        await passing.wait()
        for piece in pieces[scope["path"]]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        handed.release()
        while (await receive())["type"] != "http.disconnect":
            pass

    async def let_pass(_: int) -> None:
        nonlocal passing, asked
        passing.set()
        passing = trio.Event()
        for _ in range(asked):
            await handed.acquire()
        asked = 0

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        config = Config()
        # Hypercorn closes the descriptor itself.
        config.bind = [f"fd://{listener.dup().detach()}"]
        config.accesslog = config.errorlog = None
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, app, config, mode="asgi"))
            await _obey(control, listener.getsockname()[1], let_pass)
            nursery.cancel_scope.cancel()


async def _obey(control: str, port: int, let_pass: Pass) -> None:
    """Serves the control socket until SIGTERM."""

    async def serve_control(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            while line := await stream.receive_some(100):
                if count := int(line):
                    await let_pass(count)
                await stream.send_all(json.dumps(_figures()).encode() + b"\n")

    with socket.socket(socket.AF_UNIX) as sock, trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        sock.bind(control)
        sock.listen(1)
        async with trio.open_nursery() as nursery:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            nursery.start_soon(trio.serve_listeners, serve_control, [listener])
            print(f"listening on http://127.0.0.1:{port}", flush=True)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()


def _figures() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"cpu_s": time.process_time(), "resident_mb": pages * resource.getpagesize() / 2**20}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ours", control]:
            trio.run(ours, control)
        case ["bare", control, path]:
            trio.run(bare, control, path)
        case _:
            sys.exit(__doc__)
