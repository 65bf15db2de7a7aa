"""Any output of a guest gets into its log line by line, at a limited rate, so the daemon has time for others."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from tests.names import named
from volant.channel import AgentClient, AgentResponse
from volant.host import Host
from volant.logs import MAX_LINE_BYTES, LogGap, VmLog, VmLogs
from volant.model.agent import FRAME_STDOUT, LOG_ID_HEADER, encode_log_frame
from volant.session import _console
from volant.session._console import ConsolePump
from volant.session._lines import Line, LineSplitter, piece_of
from volant.session._output import pump_output
from volant.session._workload import ReportLimit

LONGEST_S = 0.1
"""How long the event loop may be blocked; a piece takes some milliseconds of an idle machine."""


@pytest.fixture
def own_garbage() -> Iterator[None]:
    """What other tests have left is not looked through while somebody's turns are measured."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
async def log(tmp_path: Path) -> VmLog:
    logs = VmLogs(Host(), tmp_path / "logs")
    await logs.prepare()
    return logs.open(1, named("demo"))


async def slowest_turn(into: list[float]) -> None:
    while True:
        # Of the processor, as the machine may have other things to do.
        began = time.thread_time()
        await trio.lowlevel.checkpoint()
        into.append(time.thread_time() - began)


async def lines_of(log: VmLog) -> list[str]:
    lines: list[str] = []
    async with log.cursor(follow=False) as cursor:
        while taken := await cursor.take():
            if isinstance(taken, LogGap):
                lines.append(f"gap {taken.first} {taken.last}")
            else:
                lines += [frame.decode() for frame in taken]
    return lines


class Output:
    """An agent that sends so many chunks of its workload's output."""

    status = 200
    headers = ((LOG_ID_HEADER.lower().encode(), b"1"),)

    def __init__(self, chunks: int, chunk: bytes) -> None:
        self._chunks = chunks
        self._chunk = chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        position = 0
        for _ in range(self._chunks):
            await trio.lowlevel.checkpoint()
            yield b"".join(
                encode_log_frame(FRAME_STDOUT, position + start, 0, self._chunk[start : start + 65536])
                for start in range(0, len(self._chunk), 65536)
            )
            position += len(self._chunk)

    def stream(self, *_: object, **__: object) -> Output:
        return self

    async def __aenter__(self) -> AgentResponse:
        return cast(AgentResponse, self)

    async def __aexit__(self, *_: object) -> None:
        pass


FLOODS = {"line feeds": b"\n" * 131072, "no text": b"\xff" * 131072, "zeros": bytes(131072), "empty frames": b""}


@pytest.mark.slow
@pytest.mark.usefixtures("own_garbage")
@pytest.mark.parametrize("what", FLOODS)
async def test_no_output_blocks_the_event_loop(log: VmLog, what: str) -> None:
    turns: list[float] = []
    output = Output(4, FLOODS[what])
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slowest_turn, turns)
            await pump_output(cast(AgentClient, output), log, "b", "1")
            nursery.cancel_scope.cancel()
    assert max(turns) < LONGEST_S
    if what == "line feeds":
        assert log.newest == 4 * 131072


async def test_lines_above_the_rate_limit_wait(log: VmLog, autojump_clock: trio.testing.MockClock) -> None:
    """A hundred thousand a second; a second's worth may come at once."""
    began = trio.current_time()
    await pump_output(cast(AgentClient, Output(8, b"\n" * 131072)), log, "b", "1")
    assert log.newest == 8 * 131072
    assert 9 < trio.current_time() - began < 11


def test_pieces_have_a_bounded_number_of_lines_and_bytes() -> None:
    text = (b"x" * 99 + b"\n") * 3000
    assert piece_of(text) == text[:65536]
    assert piece_of(text, 299_000) == text[299_000:]
    assert piece_of(b"\n" * 10_000, 5) == b"\n" * 2000
    assert piece_of(b"short\n") == b"short\n"


@pytest.mark.slow
@pytest.mark.usefixtures("own_garbage")
async def test_a_console_of_line_feeds_does_not_block_the_event_loop(log: VmLog, tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"\r\n" * 200_000)
    turns: list[float] = []
    with ConsolePump(Host(), path, log, "b") as pump, trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slowest_turn, turns)
            await pump.drain()
            nursery.cancel_scope.cancel()
    assert max(turns) < LONGEST_S
    assert log.newest == 200_000


async def test_a_console_far_ahead_of_its_log_is_cut_and_its_file_stays_small(
    log: VmLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_console, "BEHIND_BYTES", 2_000_000)
    path = tmp_path / "console.log"
    path.write_bytes(b"early\n" * 1_000_000 + b"late\n")
    fed: list[bytes] = []
    with ConsolePump(Host(), path, log, "b", feed=fed.append) as pump:
        await pump.drain()
    assert fed[0] == b"\r\n[5000005 bytes of the console are lost]\r\n", "who watches the console knows, too"
    lines = await lines_of(log)
    assert "[5000005 bytes of the console are lost]" in lines[0]
    assert '"late"' in lines[-1]
    assert 150_000 < len(lines) < 170_000
    assert path.stat().st_size == 6_000_005
    assert path.stat().st_blocks * 512 < 1_200_000


@pytest.mark.programs
async def test_space_that_no_line_comes_from_is_freed(log: VmLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hypervisor that was taken over fills what was freed, and reserves space beyond the end."""
    monkeypatch.setattr(_console, "BEHIND_BYTES", 2_000_000)
    # Like the directories of VMs: a tmpfs.
    with TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "console.log"
        path.write_bytes(b"a line of text\n" * 120_000)
        with ConsolePump(Host(), path, log, "b") as pump:
            await pump.drain()
            with path.open("r+b") as file:
                file.write(b"\xa5" * 1_500_000)
            command = ["fallocate", "--keep-size", "--offset", "2G", "--length", "8M", str(path)]
            await trio.run_process(command)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump.follow)
                with trio.fail_after(30):
                    while path.stat().st_blocks * 512 > 1_200_000:  # noqa: ASYNC110 - another task's work
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        assert path.stat().st_size == 1_800_000


@pytest.mark.slow
async def test_the_end_of_a_long_console_is_logged_in_time(
    log: VmLog, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"\n" * 2_000_000 + b"last words")
    began = trio.current_time()
    with ConsolePump(Host(), path, log, "b") as pump:
        await pump.finish()
    assert trio.current_time() - began <= _console.FINISH_S
    assert '"last words"' in (await lines_of(log))[-1]


async def test_the_next_pump_does_not_read_dropped_output_again(
    log: VmLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_console, "BEHIND_BYTES", 200_000)
    path = tmp_path / "console.log"
    path.write_bytes(b"x\n" * 500_000)
    with ConsolePump(Host(), path, log, "b") as pump:
        await pump.drain()
    newest = log.newest
    with path.open("ab") as file:
        file.write(b"more\n")
        os.fsync(file.fileno())
    with ConsolePump(Host(), path, log, "b") as pump:
        await pump.drain()
    assert log.newest == newest + 1


def test_lf_and_crlf_end_lines_and_the_rest_waits() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"a\r\nb\n\nrest") == [Line(b"a", False, 3), Line(b"b", False, 5), Line(b"", False, 6)]
    assert splitter.feed(b" of it\n") == [Line(b"rest of it", False, 17)]
    assert splitter.flush() == []


def test_a_line_too_long_is_split_between_characters_and_marked() -> None:
    text = "ä" * MAX_LINE_BYTES
    splitter = LineSplitter()
    lines = splitter.feed(text.encode() + b"\n")
    assert [line.partial for line in lines] == [True] * (len(lines) - 1) + [False]
    assert all(len(line.data) <= MAX_LINE_BYTES + 2 for line in lines)
    assert "".join(line.data.decode() for line in lines) == text


def test_a_gap_ends_the_line_that_it_cuts() -> None:
    splitter = LineSplitter()
    splitter.feed(b"half")
    assert splitter.skip_to(100) == [Line(b"half", False, 4)]
    assert splitter.feed(b"x\n") == [Line(b"x", False, 102)]


@given(st.lists(st.sampled_from([b"a", b"bc\n", b"\n", b"\r\n", b"\xff", b"y" * 70_000]), max_size=12), st.data())
def test_resuming_at_the_end_of_any_line_gives_the_same_lines(pieces: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(pieces)
    splitter = LineSplitter()
    lines = [line for piece in pieces for line in splitter.feed(piece)] + splitter.flush()
    assert sum(len(line.data) for line in lines) <= len(whole)
    seen = data.draw(st.integers(0, len(lines)))
    position = lines[seen - 1].end if seen else 0
    again = LineSplitter(position)
    assert again.feed(whole[position:]) + again.flush() == lines[seen:]


async def test_few_reports_are_not_late_and_many_are_bounded(autojump_clock: trio.abc.Clock) -> None:
    limit = ReportLimit()
    began = trio.current_time()
    for _ in range(4):
        await limit.pause()
    assert trio.current_time() == began, "a program that starts and ends is reported as it does"
    for _ in range(200):
        await limit.pause()
    assert trio.current_time() - began > 1700
    await trio.sleep(300)
    quiet = trio.current_time()
    await limit.pause()
    assert trio.current_time() == quiet
