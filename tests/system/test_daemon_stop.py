"""A clean stop closes streams, deletes the VMs of an ephemeral daemon, and obeys a second signal."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, closing

import trio
from trio_websocket import ConnectionClosed

from tests.system.kit import Daemon, boot, run, websocket

UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
YES = json.dumps({"command": ["yes", "so much that no buffer takes it"]})


def stalled(daemon: Daemon, request: str, fields: str = "", body: str = "") -> socket.socket:
    """Sends a request, and never reads the answer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, _, port = daemon.base_url.removeprefix("http://").partition(":")
    sock.connect((host, int(port)))
    sock.sendall(f"{request} HTTP/1.1\r\nHost: {host}:{port}\r\n{fields}\r\n{body}".encode())
    return sock


async def test_streams_end_cleanly_beside_clients_that_read_nothing(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon(ephemeral=False)
    sockets = f"ws{daemon.base_url.removeprefix('http')}/ws/v1/vms/demo"
    ended = set[str]()
    codes: dict[str, int | None] = {}
    async with daemon.client() as client, daemon.http() as http, AsyncExitStack() as stack:
        await boot(client, "demo")
        flood = "setsid sh -c 'while :; do echo a line of many; done >/dev/console' >/dev/null 2>&1 &"
        await run(client, "demo", "sh", "-c", flood)
        exec_fields = f"Content-Type: application/json\r\nContent-Length: {len(YES)}\r\n"
        for request, fields, body in (
            ("GET /api/v1/events/vms?since=0", "", ""),
            ("GET /api/v1/vms/demo/logs?since=0&follow=true", "", ""),
            ("GET /ws/v1/vms/demo/logs?since=0", UPGRADE, ""),
            ("GET /ws/v1/vms/demo/console", UPGRADE, ""),
            ("POST /api/v1/vms/demo/agent/v1/exec", exec_fields, YES),
        ):
            stack.enter_context(closing(stalled(daemon, request, fields, body)))

        async def read_events(task_status: trio.TaskStatus[None]) -> None:
            async with http.stream("GET", "/api/v1/events/vms") as events:
                pieces = events.aiter_bytes()
                await anext(pieces)
                task_status.started()
                # To its end, and that is no error.
                async for _ in pieces:
                    pass
            ended.add("events")

        async def read_socket(path: str, task_status: trio.TaskStatus[None]) -> None:
            async with websocket(f"{sockets}/{path}") as connection:
                await connection.get_message()
                task_status.started()
                while path not in codes:
                    try:
                        await connection.get_message()
                    except ConnectionClosed as closed:
                        codes[path] = closed.reason.code if closed.reason else None
                ended.add(path)

        async with trio.open_nursery() as nursery:
            await nursery.start(read_events)
            await nursery.start(read_socket, "logs?tail=10")
            await nursery.start(read_socket, "console")
            # Long enough to fill the buffers of the others.
            await trio.sleep(1.0)
            daemon.terminate()
            nursery.cancel_scope.deadline = trio.current_time() + 20
        assert set(codes.values()) == {1001}
        assert len(ended) == 3
        assert daemon.wait() == 0


def test_signals_that_come_while_it_stops_leave_nothing_half_removed(make_daemon: Callable[..., Daemon]) -> None:
    for _ in range(3):
        daemon = make_daemon()
        process = daemon.process
        assert process is not None
        while process.poll() is None:
            process.terminate()
            time.sleep(0.0005)
        assert process.returncode in (0, -signal.SIGTERM), daemon.log()
        assert "stopped" in daemon.log()
        assert daemon.leftovers() == []


async def test_a_second_signal_keeps_the_state_of_the_remaining_vms(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    async with daemon.client() as client:
        # Neither has an agent: the first signal kills them, the second one does not wait for that.
        vm = await boot(client, "demo")
    daemon.terminate()
    daemon.terminate()
    assert daemon.wait() == 0
    if "the state is kept" in daemon.log():
        daemon.start()
        async with daemon.client() as client:
            kept = await client.vms.list()
        # The first signal may have deleted it by then.
        assert [each.id for each in kept] in ([vm.id], [])
    else:
        assert daemon.leftovers() == []
