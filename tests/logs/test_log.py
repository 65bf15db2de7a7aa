"""A VM's log has every line once and in order, until it expires. Gaps report missing lines."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.journal.kit import ClockHost
from tests.names import named
from volant.host._host import LinuxThreads
from volant.logs import LogCursor, LogEntry, LogGap, LogStream, VmLog, VmLogs

SOURCE = "1.1/console"
SMALL = {"segment_bytes": 16 * 1024, "max_bytes": 64 * 1024}


class Pump:
    """Brings lines as a pump does."""

    def __init__(self, host: ClockHost, log: VmLog, source: str = SOURCE, stream: LogStream = "console") -> None:
        self.host = host
        self.log = log
        self.source = source
        self.stream: LogStream = stream
        self.position = log.resume_position(source)

    def bring(self, *lines: bytes, partial: bool = False) -> None:
        entries = []
        for line in lines:
            self.position += len(line) + 1
            entries.append(
                LogEntry(
                    stream=self.stream,
                    line=line,
                    timestamp=self.host.clock.now(),
                    source=self.source,
                    position=self.position,
                    partial=partial,
                )
            )
        self.log.append(entries)

    def numbers(self, *numbers: int) -> None:
        self.bring(*(b"%d" % number for number in numbers))


@pytest.fixture
def host() -> ClockHost:
    return ClockHost()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "logs"


async def opened(host: ClockHost, directory: Path, **settings: Any) -> VmLogs:
    logs = VmLogs(host, directory, **settings)
    await logs.prepare()
    return logs


async def everything(log: VmLog, **begin: Any) -> list[dict[str, Any]]:
    """All there is now; a gap as it goes over the wire."""
    async with log.cursor(follow=False, **begin) as cursor:
        return await rest(cursor)


async def rest(cursor: LogCursor) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while taken := await cursor.take():
        found += [json.loads(frame) for frame in ([taken.frame] if isinstance(taken, LogGap) else taken)]
    return found


def lines(frames: Iterable[dict[str, Any]]) -> list[str]:
    return [frame["line"] for frame in frames]


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def newest_file(directory: Path) -> Path:
    return max(directory.glob("1-*.log"))


async def test_a_frame_is_what_the_contract_says(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(7, named("demo"))
    Pump(host, log).bring(b'a "quoted" \x1b[1m line\twith everything')
    assert await everything(log) == [
        {
            "name": "demo",
            "vm_id": 7,
            "stream": "console",
            "line": 'a "quoted" \x1b[1m line\twith everything',
            "timestamp": "2025-09-24T12:34:56Z",
            "seq": 1,
        }
    ]


async def test_bytes_that_are_no_utf8_become_replacement_characters(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    Pump(host, log).bring(b"\xff\x00 caf\xc3\xa9 \xe2\x82")
    assert lines(await everything(log)) == ["\ufffd\x00 caf\xe9 \ufffd"]


async def test_a_line_over_64_kib_is_split_between_characters(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    text = "\u20ac" * 50_000
    Pump(host, log).bring(text.encode(), b"next")
    frames = await everything(log)
    assert "".join(lines(frames[:3])) == text
    assert all(len(frame["line"].encode()) <= 64 * 1024 for frame in frames)
    assert [frame.get("partial") for frame in frames] == [True, True, None, None]
    assert [frame["seq"] for frame in frames] == [1, 2, 3, 4]


async def test_a_part_that_the_pump_split_stays_marked(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    pump = Pump(host, log)
    pump.bring(b"first", partial=True)
    pump.bring(b"rest")
    assert [frame.get("partial") for frame in await everything(log)] == [True, None]


async def test_numbers_continue_over_boots_and_restarts_of_the_daemon(host: ClockHost, directory: Path) -> None:
    for boot in range(1, 4):
        log = (await opened(host, directory)).open(1, named("demo"))
        pump = Pump(host, log, source=f"1.{boot}/console")
        assert pump.position == 0
        pump.numbers(*range(boot * 10, boot * 10 + 3))
    frames = await everything(log)
    assert [frame["seq"] for frame in frames] == list(range(1, 10))
    assert lines(frames) == ["10", "11", "12", "20", "21", "22", "30", "31", "32"]
    assert len(files(directory)) == 1


async def test_tail_since_and_stream_choose_the_first_line(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    console, stdout = Pump(host, log), Pump(host, log, "1.1/x/stdout", "stdout")
    for number in range(10):
        console.numbers(number)
        stdout.bring(b"out %d" % number)
        host.pass_time(seconds=1)
    assert [frame["seq"] for frame in await everything(log, tail=3)] == [18, 19, 20]
    assert lines(await everything(log, tail=2, streams=["stdout"])) == ["out 8", "out 9"]
    assert lines(await everything(log, tail=0)) == []
    assert len(await everything(log, tail=1000)) == 20
    assert [frame["seq"] for frame in await everything(log, since_seq=18)] == [19, 20]
    assert len(await everything(log, since_seq=0)) == 20
    assert await everything(log, since_seq=20) == await everything(log, since_seq=2000) == []
    since = host.clock.now() - timedelta(seconds=2)
    assert lines(await everything(log, since_time=since, streams=["console"])) == ["8", "9"]
    assert lines(await everything(log, since_time=host.clock.now())) == []
    assert log.tail_lines(2, "console") == ("8", "9")
    assert log.tail_lines(2) == ("9", "out 9")
    assert log.tail_lines(2, source="1.1/x/stdout") == ("out 8", "out 9")
    assert log.tail_lines(2, source="another") == ()


async def test_tail_and_since_reach_over_segments(host: ClockHost, directory: Path) -> None:
    logs = await opened(host, directory, segment_bytes=4096, max_bytes=1024 * 1024)
    log = logs.open(1, named("demo"))
    console, stdout = Pump(host, log), Pump(host, log, "1.1/x/stdout", "stdout")
    stdout.bring(b"out")
    for number in range(500):
        console.numbers(number)
        host.pass_time(seconds=1)
    assert log.statistics().segments > 10
    assert lines(await everything(log, tail=1, streams=["stdout"])) == ["out"]
    assert lines(await everything(log, tail=300, streams=["console"])) == [str(n) for n in range(200, 500)]
    since = host.clock.now() - timedelta(seconds=123)
    assert lines(await everything(log, since_time=since)) == [str(n) for n in range(377, 500)]
    assert lines(await everything(log, since_seq=401)) == [str(n) for n in range(400, 500)]
    assert log.tail_lines(100) == tuple(str(n) for n in range(400, 500))


async def test_readers_search_the_history_one_after_the_other(host: ClockHost, directory: Path) -> None:
    running: list[int] = [0]
    most: list[int] = []

    class Threads(LinuxThreads):
        async def run(self, call: Callable[..., Any], *args: object) -> Any:
            running[0] += 1
            most.append(running[0])
            try:
                return await super().run(call, *args)
            finally:
                running[0] -= 1

    logs = await opened(host, directory)
    log, other = logs.open(1, named("demo")), logs.open(2, named("other"))
    for each in (log, other):
        for _ in range(100):
            Pump(host, each).bring(*[b"x" * 100] * 100)
    host.threads = Threads()
    got = []

    async def read(each: VmLog) -> None:
        got.append(await everything(each, streams=["stdout"]))
        got.append(await everything(each, tail=1, streams=["stdout"]))

    async with trio.open_nursery() as nursery:
        for each in [log, other] * 4:
            nursery.start_soon(read, each)
    assert got == [[]] * 16
    # In pieces, after each of which it is another reader's turn.
    assert len(most) > 8 * 4
    assert max(most) == 1


async def test_a_follower_reads_history_and_new_lines_once(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory, segment_bytes=4096, max_bytes=1024 * 1024)).open(1, named("demo"))
    pump = Pump(host, log)
    pump.numbers(*range(200))
    got: list[dict[str, Any]] = []
    async with log.cursor(tail=150) as cursor, trio.open_nursery() as nursery:

        async def follow() -> None:
            while len(got) < 450:
                taken = await cursor.take(max_bytes=2000)
                assert isinstance(taken, list)
                got.extend(json.loads(frame) for frame in taken)

        nursery.start_soon(follow)
        for number in range(200, 500):
            pump.numbers(number)
            if number % 10 == 0:
                await trio.lowlevel.checkpoint()
    assert lines(got) == [str(n) for n in range(50, 500)]


async def test_a_filtered_follower_gets_only_its_stream(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    console, stdout = Pump(host, log), Pump(host, log, "1.1/x/stdout", "stdout")
    async with log.cursor(tail=0, streams=["stdout"]) as cursor, trio.open_nursery() as nursery:
        nursery.start_soon(trio.testing.wait_all_tasks_blocked)
        console.numbers(1, 2, 3)
        stdout.bring(b"out")
        taken = await cursor.take()
        assert isinstance(taken, list)
        assert lines(json.loads(frame) for frame in taken) == ["out"]


def ring_frames(log: VmLog) -> list[bytes]:
    return [] if log._ring is None else list(log._ring._frames.values())


async def test_a_log_without_readers_has_no_line_in_memory(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    pump = Pump(host, log)
    async with log.cursor():
        pump.numbers(1)
        assert len(ring_frames(log)) == 1
    assert ring_frames(log) == []
    pump.numbers(2)
    assert lines(await everything(log)) == ["1", "2"]


async def test_a_reader_behind_retention_gets_a_gap(host: ClockHost, directory: Path) -> None:
    logs = await opened(host, directory, **SMALL)
    log = logs.open(1, named("demo"))
    pump = Pump(host, log)
    async with log.cursor() as cursor:
        for start in range(0, 20_000, 100):
            pump.numbers(*range(start, start + 100))
        await logs.sweep()
        assert sum(file.stat().st_size for file in files(directory)) <= 64 * 1024
        gap = await cursor.take()
        assert isinstance(gap, LogGap)
        # What the disk has let go of may still be in the ring.
        assert gap.first == 1 < gap.last < log.oldest
        taken = await cursor.take()
        assert isinstance(taken, list)
        assert json.loads(taken[0])["seq"] == gap.last + 1
    frames = await everything(log, since_seq=5)
    assert frames[0] == {"gap": {"from": 6, "to": log.oldest - 1}}
    assert lines(frames[1:]) == [str(n) for n in range(log.oldest - 1, 20_000)]
    assert "gap" not in (await everything(log))[0]


async def test_old_lines_expire_and_numbers_continue(host: ClockHost, directory: Path) -> None:
    logs = await opened(host, directory)
    log = logs.open(1, named("demo"))
    pump = Pump(host, log)
    pump.numbers(1, 2, 3)
    host.pass_time(days=6)
    await logs.sweep()
    assert len(await everything(log)) == 3
    host.pass_time(days=2)
    await logs.sweep()
    assert await everything(log) == []
    for again in (logs, await opened(host, directory)):
        await again.sweep()
        await again.sweep()
        log = again.open(1, named("demo"))
        assert (log.newest, log.resume_position(SOURCE)) == (3, pump.position)
    Pump(host, log).numbers(4)
    assert [(frame["seq"], frame["line"]) for frame in await everything(log)] == [(4, "4")]


# Resuming


async def test_a_source_continues_however_long_it_was_silent(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory, **SMALL)).open(1, named("demo"))
    quiet = Pump(host, log, "1.1/with a space\n/stdout", "stdout")
    quiet.bring(b"once")
    console = Pump(host, log)
    for start in range(0, 20_000, 100):
        console.numbers(*range(start, start + 100))
    log = (await opened(host, directory, **SMALL)).open(1, named("demo"))
    assert log.resume_position(SOURCE) == console.position
    assert log.resume_position(quiet.source) == quiet.position == 5
    assert log.resume_position("1.2/console") == 0


async def test_invented_sources_are_limited(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    for number in range(1000):
        Pump(host, log, f"1.1/{number}" + "x" * 1000).bring(b"line")
    assert len(log._resume) <= 64
    assert len(log._tokens) <= 64
    assert max(map(len, log._resume)) <= 1000


@pytest.mark.parametrize("cut", [1, 20, 150, 70_000])
async def test_a_source_repeats_the_lines_of_a_torn_end(host: ClockHost, directory: Path, cut: int) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    said = [b"%d" % number for number in range(50)] + [b"long " * 30_000]
    Pump(host, log).bring(*said)
    whole = await everything(log)
    file = newest_file(directory)
    with file.open("r+b") as opened_file:
        opened_file.truncate(file.stat().st_size - cut)

    log = (await opened(host, directory)).open(1, named("demo"))
    pump = Pump(host, log)
    assert log.newest == 50
    missing, position = [], 0
    for line in said:
        position += len(line) + 1
        if position > pump.position:
            missing.append(line)
    pump.bring(*missing)
    assert await everything(log) == whole
    log = (await opened(host, directory)).open(1, named("demo"))
    assert await everything(log) == whole
    assert log.resume_position(SOURCE) == position


async def test_a_segment_with_a_torn_beginning_is_replaced(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    Pump(host, log).numbers(1, 2)
    for torn in (b"", b'# {"seq":3,"na'):
        (directory / "1-0000000000000003-1.log").write_bytes(torn)
        logs = await opened(host, directory)
        log = logs.open(1, named("demo"))
        assert log.newest == 2
        await logs.sweep()
        assert len(files(directory)) == 1
    pump = Pump(host, log)
    pump.numbers(3)
    assert lines(await everything(log)) == ["1", "2", "3"]


async def test_bytes_that_rotted_are_skipped(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    Pump(host, log).bring(b"before", b"rotten", b"after")
    file = newest_file(directory)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"rotten", b"rott\xffn"))
    assert log.tail_lines(3) == ("before", "after")
    # The checkpoint that the segment begins with.
    host.pass_time(seconds=1)
    file.write_bytes(data.replace(b'"demo"', b'"d\xffmo"', 1))
    log = (await opened(host, directory)).open(1, named("demo"))
    Pump(host, log).bring(b"more")
    assert lines(await everything(log))[-1] == "more"


async def test_zeros_after_a_power_cut_are_a_gap_or_an_end(host: ClockHost, directory: Path) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    Pump(host, log).numbers(*range(100))
    file = newest_file(directory)
    data = file.read_bytes()
    file.write_bytes(data[:3000] + bytes(2000) + data[5000:])
    log = (await opened(host, directory)).open(1, named("demo"))
    Pump(host, log).bring(b"after")
    frames = await everything(log)
    assert lines(frames)[-1] == "after"
    assert [frame["seq"] for frame in frames] == list(range(1, len(frames) + 1))


async def test_a_full_disk_loses_lines_and_reports_it(
    host: ClockHost, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = (await opened(host, directory)).open(1, named("demo"))
    pump = Pump(host, log)
    pump.numbers(*range(10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with log.cursor(tail=0) as follower:
        resource.setrlimit(resource.RLIMIT_FSIZE, (newest_file(directory).stat().st_size + 300, hard))
        try:
            pump.numbers(*range(10, 20))
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
            pump.numbers(*range(20, 30))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        pump.numbers(*range(30, 40))
        live = await follower.take()
        assert isinstance(live, list)
        assert len(live) == 30
    lost = log.statistics().lost
    assert 10 < lost < 20
    assert "loses lines" in caplog.text
    for again in (log, (await opened(host, directory)).open(1, named("demo"))):
        frames = await everything(again)
        gaps = [frame["gap"] for frame in frames if "gap" in frame]
        missing = [seq for gap in gaps for seq in range(gap["from"], gap["to"] + 1)]
        assert missing == list(range(31 - lost, 31))
        assert lines(frame for frame in frames if "gap" not in frame)[-10:] == [str(n) for n in range(30, 40)]
        assert again.resume_position(SOURCE) == pump.position


# The end of a VM


async def test_the_log_of_a_deleted_vm_ends_and_expires(host: ClockHost, directory: Path) -> None:
    logs = await opened(host, directory)
    log = logs.open(1, named("demo"))
    pump = Pump(host, log)
    pump.numbers(1, 2)
    async with log.cursor() as follower:
        assert len(await rest_of_now(follower)) == 2
        await logs.forget(1)
        assert await follower.take() == []
    with pytest.raises(trio.ClosedResourceError):
        pump.numbers(3)
    host.pass_time(hours=12)
    await logs.forget(1)
    again = await opened(host, directory)
    for registry in (logs, again):
        await registry.sweep()
        found = registry.find(1)
        assert found is not None
        assert (found.ended, found.name) == (True, "demo")
        assert lines(await everything(found)) == ["1", "2"]
        async with found.cursor() as cursor:
            assert len(await rest(cursor)) == 2
    host.pass_time(hours=13)
    await again.sweep()
    assert again.find(1) is None
    assert files(directory) == []


async def rest_of_now(cursor: LogCursor) -> list[bytes]:
    taken = await cursor.take()
    assert isinstance(taken, list)
    return taken


async def test_a_log_can_be_discarded_during_a_sweep(
    host: ClockHost, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = await opened(host, directory)
    for vm_id in (1, 2):
        Pump(host, logs.open(vm_id, named(f"vm-{vm_id}"))).numbers(vm_id)
    await logs.forget(1, keep_s=0)
    await logs.forget(2)
    logs = await opened(host, directory)
    sweeping, may_go_on = trio.Event(), trio.Event()
    remove_tree = host.files.remove_tree

    async def slow(path: Path) -> None:
        if path.name == "1.deleted":
            sweeping.set()
            await may_go_on.wait()
        await remove_tree(path)

    monkeypatch.setattr(host.files, "remove_tree", slow)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(logs.sweep)
            await sweeping.wait()
            assert await logs.discard(2)
            may_go_on.set()
    assert logs.ids() == set()


async def test_logs_of_unknown_vms_are_forgotten(host: ClockHost, directory: Path) -> None:
    logs = await opened(host, directory)
    for vm_id in (1, 2):
        Pump(host, logs.open(vm_id, named(f"vm-{vm_id}"))).numbers(vm_id)
    logs = await opened(host, directory)
    await logs.forget_unknown({2})
    kept, gone = logs.find(2), logs.find(1)
    assert kept is not None
    assert gone is not None
    assert (kept.ended, gone.ended) == (False, True)
    assert logs.find(3) is None


async def test_keep_removes_the_segments_of_floods(host: ClockHost, directory: Path) -> None:
    logs = VmLogs(host, directory, segment_bytes=16 * 1024, max_bytes=64 * 1024)
    async with trio.open_nursery() as nursery:
        await nursery.start(logs.keep)
        pump = Pump(host, logs.open(1, named("demo")))
        for start in range(0, 20_000, 100):
            pump.numbers(*range(start, start + 100))
        with trio.fail_after(20):
            while len(files(directory)) > 4:  # noqa: ASYNC110 - it is the disk that tells
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
