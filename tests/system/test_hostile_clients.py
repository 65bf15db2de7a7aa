"""Hostile clients: the daemon answers `/healthz` all the time, and frees their resources afterwards."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import h2.config
import h2.connection
import httpx
import pytest
import trio

from tests.system import netns
from tests.system.kit import BOOT_S, Daemon, boot, load, patched, run, spec
from volant.client import LogLine

LINES = load("VOLANT_TEST_LOG_LINES", usual=100_000, full=100_000)
VANISHING = 1000
VANISHED_S = load("VOLANT_TEST_VANISHED_S", usual=8, full=0)
"""Seconds after which the daemon drops a silent peer; 0: the daemon's own limit."""

ANSWER_S = 10.0
"""Deadline of `/healthz` on a busy machine; `make bench` measures it exactly."""
RSS_MB = 60
"""Memory that Python may retain after a load: a thousand clients leave 40 MiB, and more clients leave no more."""

UPGRADE = (
    "GET /ws/v1/vms/{name}/logs{query} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
TALK = f"""
import os, sys, time
while not os.path.exists("/run/go"):
    time.sleep(0.05)
for first in range(0, {LINES}, 1000):
    sys.stdout.write("".join("%099d\\n" % i for i in range(first, first + 1000)))
    sys.stdout.flush()
time.sleep(1e9)
"""


class Watch:
    """Watches the daemon with requests on a connection of its own."""

    def __init__(self, daemon: Daemon, client: httpx.AsyncClient) -> None:
        self._daemon = daemon
        self._client = client
        self._before_mb = daemon.rss_mb()
        self._before_fds = self.descriptors()
        self.took_s: list[float] = []

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self._daemon.pid}/fd").iterdir())

    async def keep(self) -> None:
        while True:
            began = time.monotonic()
            answer = await self._client.get("/healthz", timeout=ANSWER_S)
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
            self.took_s.append(time.monotonic() - began)
            await trio.sleep(0.02)

    async def given_back(self, within_s: float) -> None:
        """Waits until the descriptors are closed, and with them the memory is freed."""
        with trio.fail_after(within_s):
            while self.descriptors() > self._before_fds + 3:  # noqa: ASYNC110 - another process's
                await trio.sleep(0.05)
        grown_mb = self._daemon.rss_mb() - self._before_mb
        took = sorted(self.took_s)
        print(
            f"{len(took)} answers, median {1000 * took[len(took) // 2]:.1f} ms, slowest {1000 * took[-1]:.1f} ms; "
            f"grown by {grown_mb:.1f} MiB"
        )
        assert grown_mb < RSS_MB


@asynccontextmanager
async def watching(daemon: Daemon, within_s: float = 30.0, *, unix: Path | None = None) -> AsyncIterator[Watch]:
    """Watches the daemon until the block ends; afterwards its resources are freed."""
    transport = httpx.AsyncHTTPTransport(uds=str(unix)) if unix is not None else None
    base_url = "http://localhost" if unix is not None else daemon.base_url
    async with httpx.AsyncClient(base_url=base_url, transport=transport, trust_env=False) as client:
        await client.get("/healthz", timeout=ANSWER_S)
        watch = Watch(daemon, client)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.keep)
            yield watch
            await watch.given_back(within_s)
            nursery.cancel_scope.cancel()


async def connect(daemon: Daemon) -> trio.SocketStream:
    host, port = daemon.base_url.removeprefix("http://").split(":")
    return await trio.open_tcp_stream(host, int(port))


async def test_requests_that_crash_hypercorn_do_no_harm(daemon: Daemon) -> None:
    daemon.kept = {"demo"}
    async with daemon.client() as client:
        await boot(client, "demo")
    upgrade = UPGRADE.format(name="demo", query="").encode()
    relayed = upgrade.replace(b"/ws/v1/vms/demo/logs", b"/api/v1/vms/demo/agent/v1/exec")
    http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, validate_outbound_headers=False))
    http2.initiate_connection()
    http2.send_headers(1, [(":method", "CONNECT"), (":authority", "localhost")], end_stream=True)
    connect_without_path = http2.data_to_send()

    async def send(data: bytes, *statuses: bytes) -> None:
        async with await connect(daemon) as stream:
            await stream.send_all(data)
            with trio.fail_after(60):
                head = await stream.receive_some(65536)
            assert head.split(b" ", 2)[1] in statuses, head

    async with watching(daemon), trio.open_nursery() as nursery:
        for extra in (b"x", b"\x81\x80\0\0\0\0", b"y" * 70_000):
            for request in (upgrade, relayed):
                for _ in range(10):
                    nursery.start_soon(send, request + extra, b"101", b"400")
        for _ in range(30):
            nursery.start_soon(send, connect_without_path, b"505")


@pytest.mark.full
async def test_readers_that_never_read_block_nothing_while_100_000_lines_pass(daemon: Daemon) -> None:
    daemon.kept = set()
    async with daemon.client() as client:
        workload = {"entrypoint": ["python3.13", "-c", TALK], "restart": "never"}
        await client.plugins.install({"name": "talker", "version": "1", "workload": workload})
        waited = await client.vms.create_and_wait(spec("talker", plugin="talker"), timeout_s=BOOT_S)
        assert waited.outcome == "met"
        streams = []
        async with watching(daemon):
            for _ in range(20):
                stream = await connect(daemon)
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                await stream.send_all(UPGRADE.format(name="talker", query="?since=0").encode())
                assert (await stream.receive_some(12)) == b"HTTP/1.1 101"
                streams.append(stream)
            async with client.vms.logs("talker", tail=0, streams=["stdout"]) as log:
                await run(client, "talker", "touch", "/run/go")
                with trio.fail_after(240):
                    async for item in log:
                        if isinstance(item, LogLine) and int(item.line) == LINES - 1:
                            break
            for stream in streams:
                await trio.aclose_forcefully(stream)
        await client.vms.delete("talker")
        await client.plugins.delete("talker")


PATIENCE = """
from msgspec.structs import replace
from volant.api import _app
from volant.http import Limits, _serving

def shorter():
    return replace(Limits(), send_s=%s)

change(_app, "Limits", shorter)
change(_serving, "Limits", shorter)
"""


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
async def test_1000_event_streams_that_vanish_silently_are_dropped(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    path = tmp_path / "api.sock"
    patience = patched(PATIENCE % VANISHED_S) if VANISHED_S else ()
    daemon = make_daemon("--listen", f"0.0.0.0:0,unix:{path}", "--insecure", wrapper=(*netns.IN_ITS_OWN, *patience))
    port = int(daemon.base_url.rpartition(":")[2])
    within_s = 30 + 3 * (VANISHED_S or 300)
    async with watching(daemon, within_s, unix=path) as watch:
        with netns.clients(daemon.pid) as clients:
            await trio.to_thread.run_sync(clients.connect, port, VANISHING)
            assert watch.descriptors() > VANISHING
            await trio.to_thread.run_sync(clients.vanish)
            # The daemon sends each an event, which is never acknowledged.
            async with httpx.AsyncClient(
                base_url="http://localhost", transport=httpx.AsyncHTTPTransport(uds=str(path)), trust_env=False
            ) as client:
                body = {"name": "p", "version": "1"}
                (await client.post("/api/v1/plugins", json=body)).raise_for_status()
                vm = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}
                (await client.post("/api/v1/vms", json=vm)).raise_for_status()
                (await client.delete("/api/v1/vms/demo", timeout=60)).raise_for_status()
            await watch.given_back(within_s)
