"""A chat server: `python -m examples.chat_room [PORT]`, then `nc localhost PORT`, twice.

    system
    ├─ room             one actor; after it crashes, clients join again by themselves
    ├─ connections      dynamic: one child for each client; the end of one affects no other
    └─ listener         an async function; stopped first, so no client arrives during the shutdown

Type `/crash` to see the room crash and come back.
"""

from __future__ import annotations

import logging
import signal
import sys
from functools import partial
from itertools import count

import trio

from actors import TEMPORARY, Child, DynamicSupervisor, Log, Started, Supervisor, open_system

from .connection import Connection
from .room import Room

CLIENTS_MAX = 1000


def build(listeners: list[trio.SocketListener]) -> Supervisor:
    """Returns the whole tree. The log outlives the room's crashes because it is made here."""
    log = Log(max_frames=10_000, max_bytes=1_000_000)
    room = Child("room", partial(Room, log))
    connections = DynamicSupervisor()
    numbers = count(1)

    async def accept(listener: trio.SocketListener) -> None:
        while True:
            stream = await listener.accept()
            if len(connections.names) >= CLIENTS_MAX:
                await stream.aclose()
                continue
            start = partial(Connection, stream, room.ref, log)
            await connections.start_child(Child(f"client-{next(numbers)}", start, TEMPORARY))

    async def serve(*, task_status: Started) -> None:
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(accept, listener)
            task_status.started()

    return Supervisor(children=[room, Child("connections", connections), Child("listener", serve)])


async def main(port: int) -> None:
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    print(f"listening on port {listeners[0].socket.getsockname()[1]}", flush=True)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with open_system(build(listeners), name="chat"):
            await anext(signals)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 0)
