"""The workload's output: a reader that returns gets all that is kept, and a gap for the rest."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from hypothesis import given, strategies as st

from tests.guest.conftest import Asker, read_until
from volant.guest import _output
from volant.guest._output import Output, parse_positions
from volant.model import agent as wire

frames = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=50)),
    max_size=8,
)


def write(agent: Asker, data: bytes, kind: int = wire.FRAME_STDOUT) -> None:
    agent.server.output.write(kind, data)


class Reader:
    """Reads as the daemon does: decodes chunks and frames, and keeps positions."""

    def __init__(self, agent: Asker, query: str = "") -> None:
        self.sock = agent.open(f"GET {wire.DAEMON_LOGS}{query} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        head = read_until(self.sock, lambda data: b"\r\n\r\n" in data)
        self.head, _, self._rest = head.partition(b"\r\n\r\n")
        self._decoder = wire.LogDecoder()
        self.frames: list[tuple[int, int, int, bytes]] = []
        self.ended = False

    def _chunks(self) -> bool:
        line, newline, rest = self._rest.partition(b"\r\n")
        if not newline:
            return False
        size = int(line, 16)
        if size == 0:
            self.ended = True
            return False
        if len(rest) < size + 2:
            return False
        self.frames += self._decoder.feed(rest[:size])
        self._rest = rest[size + 2 :]
        return True

    def read(self, count: int, kind: int = wire.FRAME_STDOUT) -> bytes:
        """Reads until there are `count` bytes of a stream, or the end; returns all of them."""
        while True:
            while self._chunks():
                pass
            data = b"".join(frame[3] for frame in self.frames if frame[0] == kind)
            if len(data) >= count or self.ended:
                return data
            piece = self.sock.recv(1 << 20)
            if not piece:
                self.ended = True
            self._rest += piece


def test_a_reader_gets_earlier_and_later_output(agent: Asker) -> None:
    write(agent, b"before\n")
    reader = Reader(agent)
    assert reader.read(7) == b"before\n"
    write(agent, b"after\n")
    write(agent, b"wrong\n", wire.FRAME_STDERR)
    assert reader.read(13) == b"before\nafter\n"
    assert reader.read(6, wire.FRAME_STDERR) == b"wrong\n"
    assert [frame[1] for frame in reader.frames if frame[0] == wire.FRAME_STDOUT] == [0, 7]
    assert all(abs(frame[2] - time.time_ns()) < 60e9 for frame in reader.frames)


def test_a_reader_resumes_in_the_middle_of_a_piece(agent: Asker) -> None:
    write(agent, b"0123456789")
    reader = Reader(agent, "?stdout=4&stderr=0")
    assert reader.read(6) == b"456789"
    assert reader.frames[0][1] == 4


def test_a_position_of_an_earlier_agent_starts_at_the_beginning(agent: Asker) -> None:
    write(agent, b"new")
    assert Reader(agent, "?stdout=100000").read(3) == b"new"


def test_without_a_reader_the_oldest_output_becomes_a_gap(agent: Asker) -> None:
    piece = bytes(range(256)) * 64
    for _ in range(100):
        write(agent, piece)
    total = 100 * len(piece)
    reader = Reader(agent, "?stdout=1000")
    data = reader.read(wire.RING_BYTES - len(piece))
    kind, position, _, gap = reader.frames[0]
    assert (kind, position) == (wire.FRAME_STDOUT_GAP, 1000)
    assert 1000 + wire.gap_length(gap) + len(data) == total
    assert data == (piece * 100)[-len(data) :]


def test_a_slow_reader_blocks_the_writer_and_loses_nothing(agent: Asker) -> None:
    reader = Reader(agent)
    total = 8 * wire.RING_BYTES
    data = os.urandom(65536)
    written = 0

    def fill() -> None:
        nonlocal written
        while written < total:
            write(agent, data)
            written += len(data)

    writer = threading.Thread(target=fill)
    writer.start()
    writer.join(1.0)
    assert writer.is_alive()
    assert written < 3 * wire.RING_BYTES
    assert reader.read(total) == data * (total // len(data))
    writer.join(10)
    assert not [frame for frame in reader.frames if frame[0] > wire.FRAME_STDERR]


def test_a_reader_that_stalls_no_longer_blocks_the_writer(agent: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_output, "HOLD_BACK_S", 0.2)
    monkeypatch.setattr(_output, "_CHECK_S", 0.05)
    reader = Reader(agent)
    data = bytes(65536)
    for _ in range(64):
        write(agent, data)
    assert agent.server.output.statistics()["stdout_bytes"] == 64 * 65536
    reader.read(wire.RING_BYTES)
    while not any(frame[0] == wire.FRAME_STDOUT_GAP for frame in reader.frames):
        reader.read(len(reader.read(0)) + 1)


def test_a_reader_that_leaves_unblocks_the_writer(agent: Asker) -> None:
    reader = Reader(agent)
    threading.Timer(0.2, reader.sock.close).start()
    for _ in range(64):
        write(agent, bytes(65536))


def test_a_new_reader_replaces_the_old_one(agent: Asker) -> None:
    first = Reader(agent)
    second = Reader(agent)
    write(agent, b"for the second")
    assert second.read(14) == b"for the second"
    assert first.read(1) == b""
    assert first.ended


def test_a_new_reader_replaces_one_that_does_not_read(agent: Asker) -> None:
    Reader(agent)

    def fill() -> None:
        for _ in range(40):
            write(agent, bytes(65536))

    filler = threading.Thread(target=fill)
    filler.start()
    filler.join(0.3)
    second = Reader(agent)
    assert len(second.read(wire.RING_BYTES)) >= wire.RING_BYTES
    second.sock.close()
    filler.join(10)


def test_the_last_output_arrives_before_the_shutdown(agent: Asker) -> None:
    reader = Reader(agent)
    write(agent, b"last words")
    done = threading.Thread(target=agent.server.output.finish, args=(5.0,))
    done.start()
    assert reader.read(1000) == b"last words"
    reader.sock.close()
    done.join(5)
    assert not done.is_alive()


def test_the_shutdown_waits_for_a_reader_of_unread_output(agent: Asker) -> None:
    write(agent, b"a short job")
    done = threading.Thread(target=agent.server.output.finish, args=(60.0,))
    done.start()
    done.join(0.2)
    assert done.is_alive()
    reader = Reader(agent)
    assert reader.read(1000) == b"a short job"
    reader.sock.close()
    done.join(10)
    assert not done.is_alive()


def test_the_shutdown_waits_for_nobody_when_all_is_read(agent: Asker) -> None:
    write(agent, b"all")
    reader = Reader(agent)
    assert reader.read(3) == b"all"
    reader.sock.close()
    done = threading.Thread(target=agent.server.output.finish, args=(60.0,))
    done.start()
    done.join(10)
    assert not done.is_alive()


def test_output_byte_by_byte_needs_no_more_memory_than_the_ring() -> None:
    output = Output()
    for _ in range(200_000):
        output.write(wire.FRAME_STDOUT, b"x")
    ring = output._rings[wire.FRAME_STDOUT]
    assert len(ring.pieces) <= 8192
    assert ring.end - ring.start <= wire.RING_BYTES


@pytest.mark.parametrize("query", ["?stdout=-1", "?stdout=x", "?stdout=%31", "?stdin=1", "?stdout", f"?stdout={2**63}"])
def test_a_malformed_position_is_a_400(agent: Asker, query: str) -> None:
    answer = agent.ask("GET", wire.DAEMON_LOGS + query)
    assert answer.status == 400
    assert answer.json()["field"] in ("stdout", "stdin")


def test_positions_default_to_the_beginning() -> None:
    assert parse_positions("stderr=5") == {wire.FRAME_STDOUT: 0, wire.FRAME_STDERR: 5}


def test_a_half_closed_reader_goes_on_reading(agent: Asker) -> None:
    reader = Reader(agent)
    reader.sock.shutdown(socket.SHUT_WR)
    write(agent, b"still here")
    assert reader.read(10) == b"still here"


@given(frames, st.integers(1, 30))
def test_frames_are_decoded_the_same_however_they_are_cut(sent: list[tuple[int, int, int, bytes]], step: int) -> None:
    data = b"".join(wire.encode_log_frame(*frame) for frame in sent)
    decoder = wire.LogDecoder()
    got = [frame for at in range(0, len(data), step) for frame in decoder.feed(data[at : at + step])]
    assert got == sent
    assert decoder.pending == 0


def test_a_gap_has_the_number_of_lost_bytes() -> None:
    frame = wire.LogDecoder().feed(wire.encode_gap(wire.FRAME_STDERR_GAP, 10, 5, 2**40))[0]
    assert frame[:3] == (wire.FRAME_STDERR_GAP, 10, 5)
    assert wire.gap_length(frame[3]) == 2**40


@pytest.mark.parametrize(
    "data",
    [
        wire.LOG_HEADER.pack(0, 0, 0, 0),
        wire.LOG_HEADER.pack(5, 0, 0, 0),
        wire.LOG_HEADER.pack(1, 0, 0, wire.MAX_FRAME_BYTES + 1),
        wire.LOG_HEADER.pack(3, 0, 0, 7),
    ],
)
def test_a_malformed_frame_raises_before_its_body_comes(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"frame|gap"):
        wire.LogDecoder().feed(data)
