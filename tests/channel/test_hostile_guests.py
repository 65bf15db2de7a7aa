"""A guest is not trusted: whatever it sends, the daemon goes on and reports why the link was lost."""

from __future__ import annotations

import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import h2.config
import h2.connection
import h2.settings
import pytest
import trio
import trio.testing

from volant.channel import AgentUnreachable, Channel, VirtioSerial, _channel, open_channel
from volant.channel._link import CONNECTION_WINDOW, OUTPUT_LIMIT, RESYNC_ZEROS, STALL_S, Link
from volant.channel._stream import LinkLost
from volant.host import Host
from volant.model.agent import RESYNC_MAGIC

Guest = Callable[[trio.SocketStream], Awaitable[None]]

PREFACE = 24


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream_id) + payload


SETTINGS = frame(4, 0, 0)


async def find_host(stream: trio.SocketStream) -> None:
    """Answers the host's magic with its nonce."""
    seen = b""
    while (at := seen.find(RESYNC_MAGIC)) < 0 or len(seen) < at + len(RESYNC_MAGIC) + 16:
        seen += await stream.receive_some(65536)
    at += len(RESYNC_MAGIC)
    await stream.send_all(seen[at : at + 16])


@asynccontextmanager
async def hostile(path: Path, guest: Guest) -> AsyncIterator[Channel]:
    """Opens a channel to a port whose guest calls `guest` on every link, and then hangs."""
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(path))
    listener.listen(4)

    async def accept() -> None:
        while True:
            sock, _ = await listener.accept()
            async with trio.SocketStream(sock) as stream:
                try:
                    await guest(stream)
                    while await stream.receive_some(65536):
                        pass
                except trio.BrokenResourceError:
                    pass

    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            async with open_channel(Host(), VirtioSerial(path)) as channel:
                yield channel
            nursery.cancel_scope.cancel()


async def lost(channel: Channel) -> str:
    with trio.fail_after(10):
        while (why := channel.statistics().last_loss) is None:  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.005)
        return why


MANY_SETTINGS = frame(4, 0, 0, b"".join(struct.pack(">HI", number, 1) for number in range(16, 16 + 2700)))
HEADERS_WITHOUT_END = frame(1, 0, 1, b"\x88")
GARBAGE = {
    "garbage": (b"\xff" * 100, "a frame of 16777215 bytes"),
    "HTTP/1": (b"HTTP/1.1 200 OK\r\n\r\n", "a frame of"),
    "an overlong frame": (SETTINGS + frame(0, 0, 1, bytes(16385)), "a frame of 16385 bytes"),
    "data on a stream that nobody opened": (SETTINGS + frame(0, 0, 1, b"x"), "broke HTTP/2"),
    "a stream of its own": (SETTINGS + frame(1, 4, 2, b"\x82\x86\x84"), "broke HTTP/2"),
    "a push": (SETTINGS + frame(5, 4, 1, struct.pack(">I", 2) + b"\x82"), "broke HTTP/2"),
    "a window too large": (SETTINGS + frame(8, 0, 0, struct.pack(">I", 2**31 - 1)), "broke HTTP/2"),
    "a window of nothing": (SETTINGS + frame(8, 0, 0, bytes(4)), "broke HTTP/2"),
    "broken header compression": (SETTINGS + frame(1, 4, 1, b"\xff\xff\xff\xff\xff"), "broke HTTP/2"),
    "headers that never end": (SETTINGS + HEADERS_WITHOUT_END + frame(9, 0, 1, b"") * 100, "broke HTTP/2"),
    "a farewell": (SETTINGS + frame(7, 0, 0, bytes(8)), "ended the link"),
    "settings out of range": (SETTINGS + frame(4, 0, 0, struct.pack(">HI", 5, 1)), "broke HTTP/2"),
    "settings that nobody knows": (SETTINGS + MANY_SETTINGS, "different settings"),
    "zeros, as an agent that begins": (bytes(RESYNC_ZEROS), "broke HTTP/2"),
}


@pytest.mark.parametrize("what", GARBAGE)
async def test_malformed_bytes_end_only_the_link(tmp_path: Path, what: str) -> None:
    data, why = GARBAGE[what]

    async def guest(stream: trio.SocketStream) -> None:
        await find_host(stream)
        await stream.send_all(data)

    async with hostile(tmp_path / "s", guest) as channel:
        with trio.fail_after(30):
            await channel.ready()
            try:
                async with await channel.open_stream(timeout_s=0.1) as stream:
                    with pytest.raises(trio.BrokenResourceError):
                        await stream.receive_some()
            except AgentUnreachable:
                pass  # it was lost before
        assert why in await lost(channel)


async def test_repeated_losses_slow_down_the_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_channel, "RETRY_MIN_S", 0.01)
    at_s: list[float] = []

    async def guest(stream: trio.SocketStream) -> None:
        at_s.append(trio.current_time())
        await find_host(stream)
        await stream.send_all(b"\xff" * 9)

    async with hostile(tmp_path / "s", guest):
        with trio.fail_after(30):
            while len(at_s) < 7:  # noqa: ASYNC110
                await trio.sleep(0.01)
    # Each of the six pauses is twice as long as the one before. A busy host makes them longer, never shorter.
    assert at_s[6] - at_s[0] >= 0.01 * (2**6 - 1)


async def test_a_flood_before_the_agent_is_found_takes_no_memory(tmp_path: Path) -> None:
    async def guest(stream: trio.SocketStream) -> None:
        for _ in range(200):
            await stream.send_all(bytes(65536))
        await stream.send_all(RESYNC_MAGIC + bytes(16))
        await find_host(stream)

    async with hostile(tmp_path / "s", guest) as channel:
        with trio.fail_after(10):
            await channel.ready()


FRAMES = {
    "pings": (frame(6, 1, 0, bytes(8)) * 1000, 17 * 15_000),
    "settings": (frame(4, 0, 0, struct.pack(">HI", 4, 65535) * 2730) * 4, 1_000_000),
}
"""Bytes that a guest repeats without end, and how many of them the daemon may read."""


@pytest.mark.parametrize("what", FRAMES)
async def test_frames_without_data_are_read_slowly_and_delay_no_other_guest(tmp_path: Path, what: str) -> None:
    frames, most = FRAMES[what]

    async def guest(stream: trio.SocketStream) -> None:
        await find_host(stream)
        await stream.send_all(SETTINGS)
        while True:
            await stream.send_all(frames)

    async with hostile(tmp_path / "s", guest) as channel:
        await channel.ready()
        worst = 0.0
        with trio.move_on_after(1.5):
            while True:
                began = time.thread_time()
                await trio.sleep(0.001)
                worst = max(worst, time.thread_time() - began)
        assert channel.connected
    # The bound is burst and rate, plus what socket buffers hold. Without one the processor would be the limit.
    assert channel.statistics().bytes_in < most
    assert worst < 0.2


async def test_answers_to_a_guest_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """A guest that sends requests and reads no answers is not read either, and in the end its link is lost."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    nonce = b"n" * 16
    link = Link(ours, nonce)

    async def guest() -> None:
        async with theirs.receive_stream:
            await theirs.receive_some(RESYNC_ZEROS + 32)
            await theirs.send_all(nonce)
            await theirs.receive_some(PREFACE)
            ping = frame(6, 0, 0, bytes(8))
            await theirs.send_all(SETTINGS + ping * 100_000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        with trio.fail_after(STALL_S * 3):
            with pytest.raises(LinkLost, match="taken no input"):
                await link.run(lambda: None)
        assert len(link._out) < OUTPUT_LIMIT
        nursery.cancel_scope.cancel()


async def test_a_paused_guest_may_read_nothing_for_any_time(autojump_clock: trio.testing.MockClock) -> None:
    """Its deadline starts again when it resumes; a guest that reads nothing then loses its link."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    nonce = b"n" * 16
    link = Link(ours, nonce)
    ready = trio.Event()
    ended: list[tuple[float, str]] = []

    async def guest() -> None:
        await theirs.receive_some(RESYNC_ZEROS + 32)
        await theirs.send_all(nonce)
        await theirs.receive_some(PREFACE)

    async def run() -> None:
        try:
            await link.run(ready.set)
        except LinkLost as error:
            ended.append((trio.current_time(), str(error)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        nursery.start_soon(run)
        await ready.wait()
        link.set_paused(True)
        await trio.sleep(1000 * STALL_S)
        assert not ended
        link.set_paused(False)
        went_on = trio.current_time()
        await trio.sleep(2 * STALL_S)
        [(when, why)] = ended
        assert "taken no input" in why
        assert when - went_on == pytest.approx(STALL_S)
        nursery.cancel_scope.cancel()


async def test_more_data_than_the_window_ends_the_link(tmp_path: Path) -> None:
    async def guest(stream: trio.SocketStream) -> None:
        await find_host(stream)
        conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        conn.initiate_connection()
        await stream.send_all(conn.data_to_send())
        while not conn.streams:
            conn.receive_data(await stream.receive_some(65536))
        conn.send_headers(1, [(":status", "200")])
        await stream.send_all(conn.data_to_send())
        for _ in range(CONNECTION_WINDOW // 16384):
            await stream.send_all(frame(0, 0, 1, bytes(16384)))

    async with hostile(tmp_path / "s", guest) as channel:
        with trio.fail_after(10):
            async with await channel.open_stream(timeout_s=5) as stream:
                assert "broke HTTP/2" in await lost(channel)
                assert len(await stream.receive_some()) <= 128 * 1024
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()


async def test_a_guest_that_allows_no_streams_is_unreachable(tmp_path: Path) -> None:
    async def guest(stream: trio.SocketStream) -> None:
        await find_host(stream)
        await stream.send_all(frame(4, 0, 0, struct.pack(">HI", 3, 0)))

    async with hostile(tmp_path / "s", guest) as channel:
        await channel.ready()
        await trio.sleep(0.05)
        with pytest.raises(AgentUnreachable):
            await channel.open_stream(timeout_s=0.05)
