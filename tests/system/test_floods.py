"""A flood on a console or in the output of a workload harms nobody, and no retained line is lost."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, Stopwatch, boot, load, run, spec, websocket
from volant.client import Client, LogLine

FLOOD_S = load("VOLANT_TEST_FLOOD_S", usual=6, full=60)
"""Seconds of the flood on the console."""
OUTPUT_MB = load("VOLANT_TEST_OUTPUT_MB", usual=30, full=200)
"""Output of the workload in MB. The log retains 64 MiB, including the fields of each line."""
RSS_MB = 60
"""Allowed growth of the daemon during a flood: its buffers, and freed memory that Python retains."""

LINE = 100
LINES = OUTPUT_MB * 10_000
OUTPUT = f"""
import sys
out = sys.stdout.buffer
for first in range(0, {LINES}, 1000):
    out.write(b"".join(b"%0{LINE - 1}d\\n" % i for i in range(first, first + 1000)))
out.flush()
"""


class Watch:
    """Watches the daemon and another VM during a flood."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._before_mb = daemon.rss_mb()
        self.grown_mb = 0.0
        self.slowest_s = 0.0
        self.asked = 0

    async def keep(self, client: Client, other: str) -> None:
        """Sends requests to the other VM until the block ends."""
        while True:
            watch = Stopwatch()
            assert await run(client, other, "echo", "well", timeout_s=20) == "well\n"
            self.slowest_s = max(self.slowest_s, watch.seconds)
            self.asked += 1
            self.grown_mb = max(self.grown_mb, self._daemon.rss_mb() - self._before_mb)
            await trio.sleep(0.2)

    def check(self) -> None:
        print(f"grown by {self.grown_mb:.1f} MiB; the other VM: {self.asked} times, slowest {self.slowest_s:.2f} s")
        assert self.grown_mb < RSS_MB
        assert self.asked > 3


@asynccontextmanager
async def reader(daemon: Daemon, name: str) -> AsyncIterator[trio.SocketStream]:
    """Opens a log socket as a byte stream, which only reads what the test reads."""
    host, port = daemon.base_url.removeprefix("http://").split(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(
            f"GET /ws/v1/vms/{name}/logs?since=0 HTTP/1.1\r\nHost: localhost\r\n"
            "Connection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        assert await stream.receive_some(12) == b"HTTP/1.1 101"
        yield stream


async def vanishes(daemon: Daemon, name: str) -> None:
    """Opens a log socket, and drops it during the flood without closing it."""
    async with reader(daemon, name) as stream:
        got = 0
        while got < 200_000:
            data = await stream.receive_some(65536)
            assert data
            got += len(data)


def contiguous(numbers: Iterable[int]) -> tuple[int, int]:
    """Checks that numbers are consecutive; returns the first and the last."""
    first = last = -1
    for number in numbers:
        if first < 0:
            first = number
        else:
            assert number == last + 1, f"{number} follows {last}"
        last = number
    return first, last


@pytest.mark.full
async def test_a_flood_of_the_console_harms_nobody(daemon: Daemon) -> None:
    # The shell numbers the lines, so a lost one shows, and uses the guest's clock.
    now = "$(cut -d. -f1 /proc/uptime)"
    flood = (
        f"exec >/dev/console; i=0; end=$(( {now} + {FLOOD_S:.0f} )); "
        f"while [ $(( i % 1000 )) -ne 0 ] || [ {now} -lt $end ]; do "
        "i=$((i+1)); echo flood $i; done; echo flood is over"
    )
    async with daemon.client() as client:
        await boot(client, "demo")
        await boot(client, "other")
        seen = Watch(daemon)
        async with trio.open_nursery() as nursery, client.vms.logs("demo", since=0, streams=["console"]) as log:
            await run(client, "demo", "sh", "-c", f"setsid sh -c '{flood}' >/dev/null 2>&1 &")
            nursery.start_soon(seen.keep, client, "other")
            nursery.start_soon(vanishes, daemon, "demo")
            numbers: list[int] = []
            with trio.fail_after(FLOOD_S + 120):
                # This reader never reads.
                async with reader(daemon, "demo"):
                    async for item in log:
                        assert isinstance(item, LogLine), item
                        if item.line == "flood is over":
                            break
                        if item.line.startswith("flood "):
                            numbers.append(int(item.line.split()[1]))
            # The flooding guest answers, too.
            assert await run(client, "demo", "echo", "well") == "well\n"
            nursery.cancel_scope.cancel()
        first, last = contiguous(numbers)
        print(f"{last} lines in {FLOOD_S:g} s")
        assert (first, last) == (1, len(numbers))
        assert last > 100 * FLOOD_S
        seen.check()


@pytest.mark.full
async def test_a_flood_of_a_workloads_output_harms_nobody_and_loses_no_line(daemon: Daemon) -> None:
    async with daemon.client() as client:
        workload = {"entrypoint": ["python3.13", "-c", OUTPUT], "restart": "never"}
        await client.plugins.install({"name": "talker", "version": "1", "workload": workload})
        await boot(client, "other")
        seen = Watch(daemon)
        watch = Stopwatch()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(seen.keep, client, "other")
            waited = await client.vms.create_and_wait(spec("demo", plugin="talker"), timeout_s=BOOT_S)
            assert waited.outcome == "met"
            nursery.start_soon(vanishes, daemon, "demo")
            async with reader(daemon, "demo"):  # which never reads
                last_line = f"{LINES - 1:0{LINE - 1}d}"
                # A follower from the end: it is told which lines it missed.
                url = f"ws{daemon.base_url.removeprefix('http')}/ws/v1/vms/demo/logs?stream=stdout&tail=0"
                with trio.fail_after(300):
                    async with websocket(url) as follower:
                        while last_line not in await follower.get_message():
                            pass
            nursery.cancel_scope.cancel()
        print(f"{OUTPUT_MB} MB in {watch.seconds:.1f} s, the boot included")
        seen.check()

        # The retained lines are complete: none is missing, none is repeated.
        sequences: list[int] = []
        numbers: list[int] = []
        gaps: list[tuple[int, int]] = []
        async with daemon.http() as http, http.stream("GET", "/api/v1/vms/demo/logs?since=0") as response:
            async for text in response.aiter_lines():
                item = json.loads(text)
                if "gap" in item:
                    gaps.append((item["gap"]["from"], item["gap"]["to"]))
                    continue
                sequences.append(item["seq"])
                if item["stream"] == "stdout":
                    numbers.append(int(item["line"]))
        first, last = contiguous(numbers)
        contiguous(sequences)
        print(f"kept: {first} to {last}")
        assert last == LINES - 1
        # The log reports the lines that it dropped, and drops no more than necessary.
        assert first > 0
        assert gaps == [(1, sequences[0] - 1)]
        assert len(numbers) > 200_000
        vm_id = (await client.vms.get("demo")).id
        size = sum(path.stat().st_size for path in (daemon.state_dir / "logs").glob(f"{vm_id}-*.log"))
        assert 32 * 1024 * 1024 < size < 80 * 1024 * 1024


async def test_a_console_with_binary_output_stays_a_readable_log(daemon: Daemon) -> None:
    noise = (
        "exec >/dev/console; head -c 200000 /dev/urandom; echo; "
        r'head -c 300000 /dev/zero | tr "\0" x; echo; echo the end'
    )
    async with daemon.client() as client:
        await boot(client, "demo")
        async with client.vms.logs("demo", since=0, streams=["console"]) as log:
            await run(client, "demo", "sh", "-c", f"setsid sh -c '{noise}' >/dev/null 2>&1 &")
            long: list[LogLine] = []
            with trio.fail_after(60):
                while True:
                    item = await log.receive()
                    assert isinstance(item, LogLine)
                    assert len(item.line.encode()) <= 3 * 65536
                    if item.line.startswith("xxxx"):
                        long.append(item)
                    if item.line == "the end":
                        break
        assert sum(len(item.line) for item in long) == 300_000
        # A line over 64 KiB is split, and its parts are marked.
        assert [item.partial for item in long] == [True] * 4 + [False]
        assert await run(client, "demo", "echo", "well") == "well\n"
