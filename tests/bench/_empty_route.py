"""The baseline for requests: one route with an empty answer, with Quart-Trio on the API's server.

`python -m tests.bench._empty_route` prints its address, and serves until SIGTERM.
"""

from __future__ import annotations

import signal
import socket

import trio
from quart_trio import QuartTrio

from volant.http import serve


async def main() -> None:
    """Serves until SIGTERM."""
    app = QuartTrio("empty", static_folder=None)

    @app.get("/")
    async def empty() -> str:
        return ""

    stopping = trio.Event()
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1024) as listener,
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
    ):
        async with trio.open_nursery() as nursery:

            async def serve_it(*, task_status: trio.TaskStatus[None]) -> None:
                await serve(app, [listener], stopping=stopping, task_status=task_status)

            await nursery.start(serve_it)
            print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
            async for _ in signals:
                break
            stopping.set()


if __name__ == "__main__":
    trio.run(main)
