"""The seam to the operating system, tried on the real one."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from volant.host import Host, ProcessGone
from volant.host._watches import LinuxWatches
from volant.model import ProcessIdentity


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def tag(host: Host) -> str:
    return f"volant-test.{host.random.new_id()}"


@pytest.fixture
def started(host: Host) -> Iterator[list[ProcessIdentity]]:
    identities: list[ProcessIdentity] = []
    yield identities
    for identity in identities:
        try:
            with host.processes.open(identity) as process:
                process.kill()
        except ProcessGone:
            pass


async def spawn(host: Host, tag: str, tmp_path: Path, code: str, started: list[ProcessIdentity]) -> ProcessIdentity:
    argv = [sys.executable, "-c", code, f"guest={tag},x=y"]
    identity = await host.processes.spawn(
        argv, tag=tag, env={"ONLY": "this"}, cwd=tmp_path, stdout_path=tmp_path / "out"
    )
    started.append(identity)
    return identity


SLEEP = "import time; print('up', flush=True); time.sleep(60)"


async def until_output(host: Host, path: Path, text: bytes) -> bytes:
    with trio.fail_after(10), host.watches.open(path) as watch:
        while text not in (output := await host.files.read(path)):
            await watch.wait()
    return output


async def test_a_process_is_launched_as_if_to_be_adopted(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    leak, other = os.pipe()
    os.set_inheritable(leak, True)
    code = (
        "import os\n"
        "fds = sorted(int(f) for f in os.listdir('/proc/self/fd'))\n"
        "print(os.getsid(0) == os.getpid(), os.readlink('/proc/self/fd/0'), len(fds), os.getcwd(), dict(os.environ))\n"
        "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))\n"
        "print('end', flush=True)"
    )
    (tmp_path / "out").touch(mode=0o600)
    try:
        identity = await spawn(host, tag, tmp_path, code, started)
        output = (await until_output(host, tmp_path / "out", b"end")).decode()
    finally:
        os.close(leak)
        os.close(other)
    with host.processes.open(identity) as process, trio.fail_after(5):
        assert await process.wait() == 0
    # 0, 1, 2 and the one that lists the directory
    assert output.startswith(f"True /dev/null 4 {tmp_path}"), output
    assert "ONLY" in output
    assert "PATH" not in output
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600


async def test_the_exit_status_reaches_every_handle_and_no_zombie_stays(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    identity = await spawn(host, tag, tmp_path, SLEEP, started)
    statuses = []

    async def wait() -> None:
        with host.processes.open(identity) as process:
            statuses.append(await process.wait())

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            with host.processes.open(identity) as process:
                nursery.start_soon(process.wait)
                nursery.start_soon(process.wait)
                await trio.testing.wait_all_tasks_blocked()
                exited = [process.exited]
                process.kill()
                await process.wait()
                assert [*exited, process.exited] == [False, True]
                process.kill(signal.SIGTERM)
    assert statuses == [-signal.SIGKILL] * 2
    assert not host.files.exists(Path(f"/proc/{identity.pid}"))
    await host.processes.scan("volant-test.")
    with pytest.raises(ProcessGone):
        host.processes.open(identity)


async def test_a_child_that_nobody_watched_keeps_its_status_for_who_comes_later(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    identity = await spawn(host, tag, tmp_path, "raise SystemExit(7)", started)
    with trio.fail_after(10):
        pidfd = os.pidfd_open(identity.pid)
        await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)
        assert await host.processes.find(tag) is None
        assert not host.files.exists(Path(f"/proc/{identity.pid}")), "find() collects"
        with host.processes.open(identity) as process:
            assert await process.wait() == 7


async def test_the_end_of_a_process_that_is_not_waited_for_any_more_is_taken_for_nobody_elses(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    one, other = [await spawn(host, tag + suffix, tmp_path, SLEEP, started) for suffix in ("a", "b")]
    with host.processes.open(one) as first, host.processes.open(other) as second, trio.fail_after(20):
        for _ in range(3):
            with trio.move_on_after(0.01):
                await first.wait()
        ended = trio.Event()

        async def watch() -> None:
            # Its descriptor has the number of one that the cancelled waits have closed.
            await second.wait()
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await trio.testing.wait_all_tasks_blocked()
            first.kill()
            await first.wait()
            assert await host.processes.find(tag + "a") is None
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not ended.is_set()
            second.kill()


async def test_an_adopted_process_is_found_by_its_tag_and_watched(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    # The middle process starts it and goes, as a daemon that was killed does.
    code = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}, 'guest={tag},x=y'], start_new_session=True)\n"
    )
    with trio.fail_after(10):
        await trio.run_process([sys.executable, "-c", code], stdout=None)
        identity = await host.processes.find(tag)
        assert identity is not None
        started.append(identity)
        assert [i for i in await host.processes.scan("volant-test.") if i.tag == tag] == [identity]
        with host.processes.open(identity) as process:
            process.kill()
            assert await process.wait() is None
        assert await host.processes.find(tag) is None


async def test_another_process_is_never_taken_for_ours(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    identity = await spawn(host, tag, tmp_path, SLEEP, started)
    stranger = Host()
    for other in (
        ProcessIdentity(identity.pid, identity.start_time + 1, identity.boot_id, tag),
        ProcessIdentity(identity.pid, identity.start_time, "another-boot", tag),
        ProcessIdentity(identity.pid, identity.start_time, identity.boot_id, tag + "0"),
        ProcessIdentity(4_000_000_000 % 2**22, identity.start_time, identity.boot_id, tag),
    ):
        with pytest.raises(ProcessGone):
            stranger.processes.open(other)
    # Somebody who looks for the tag carries it too, but leads no session.
    with subprocess.Popen([sys.executable, "-c", SLEEP, tag + "1"], stdout=subprocess.DEVNULL) as looker:  # noqa: ASYNC220
        assert await host.processes.find(tag + "1") is None
        looker.kill()


async def test_a_tag_must_be_on_the_command_line(host: Host, tmp_path: Path) -> None:
    for argv, tag in ([sys.executable, "-c", ""], "volant-x"), ([sys.executable, "a b"], "a b"):
        with pytest.raises(ValueError, match="tag"):
            await host.processes.spawn(argv, tag=tag, env={}, cwd=tmp_path, stdout_path=tmp_path / "out")


async def test_a_missing_program_is_an_os_error(host: Host, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await host.processes.spawn(
            ["/no/such/program", "volant-test"], tag="volant-test", env={}, cwd=tmp_path, stdout_path=tmp_path / "out"
        )


async def test_sockets_with_long_paths_connect(host: Host, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 60] * 3)
    await host.files.mkdir(deep)
    assert stat.S_IMODE(deep.stat().st_mode) == 0o700
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    short = os.open(deep, os.O_PATH)
    await listener.bind(f"/proc/self/fd/{short}/s")
    os.close(short)
    listener.listen(1)
    with listener:
        async with await host.sockets.connect_unix(deep / "s", 1.0) as stream:
            accepted, _ = await listener.accept()
            with accepted:
                await stream.send_all(b"x")
                assert await accepted.recv(1) == b"x"
    with pytest.raises(ConnectionRefusedError):
        await host.sockets.connect_unix(deep / "s", 1.0)
    with pytest.raises(FileNotFoundError):
        await host.sockets.connect_unix(deep / "t", 1.0)


async def test_who_connects_waits_while_as_many_as_may_wait_already(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with host.sockets.listen_unix(path, backlog=0).socket as listening, trio.fail_after(5):
        listening.listen(0)
        async with await host.sockets.connect_unix(path, 1.0):
            with pytest.raises(trio.TooSlowError):
                await host.sockets.connect_unix(path, 0.05)
            async with trio.open_nursery() as nursery:

                async def come() -> None:
                    async with await host.sockets.connect_unix(path, 1.0) as stream:
                        await stream.send_all(b"second")

                nursery.start_soon(come)
                await trio.testing.wait_all_tasks_blocked()
                (await listening.accept())[0].close()
                with (await listening.accept())[0] as second:
                    assert await second.recv(100) == b"second"


async def test_files_are_replaced_whole_and_trees_removed(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    await host.files.write(path, b"one")
    await host.files.write(path, b"two", mode=0o640)
    assert await host.files.read(path) == b"two"
    assert await host.files.read(path, limit=2) == b"tw"
    assert await host.files.read_tail(path, 2) == b"wo"
    assert await host.files.read_tail(path, 100) == b"two"
    assert host.files.names(tmp_path) == ["file"]
    assert not await host.files.empty_if_larger(path, 3)
    assert await host.files.empty_if_larger(path, 2)
    assert host.files.size(path) == 0
    await host.files.make_fifo(tmp_path / "fifo")
    await host.files.make_fifo(tmp_path / "fifo")
    with pytest.raises(FileExistsError):
        await host.files.make_fifo(path)
    outside = tmp_path / "outside"
    outside.mkdir()
    await host.files.mkdir(tmp_path / "tree" / "deep")
    (tmp_path / "tree" / "link").symlink_to(outside)
    (tmp_path / "alias").symlink_to(outside)
    for name in ("tree", "tree", "alias", "file"):
        await host.files.remove_tree(tmp_path / name)
    assert host.files.names(tmp_path) == ["fifo", "outside"]


async def test_memory_that_is_not_there_is_refused_before_it_is_used(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    await host.disk.allocate(path, 1 << 20)
    assert path.stat().st_blocks * 512 >= 1 << 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(OSError, match=r"No space left|File too large"):
        await host.disk.allocate(path, host.disk.free(tmp_path) * 16)
    assert not path.exists()


def test_a_hole_gives_space_back_and_keeps_the_size(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = host.descriptors.open(path, os.O_RDWR | os.O_CREAT)
    try:
        host.descriptors.write(fd, b"x" * 65536)
        host.descriptors.sync(fd)
        before = path.stat().st_blocks
        if not host.descriptors.punch_hole(fd, 0, 32768):
            pytest.skip("this file system has no holes")
        assert path.stat().st_blocks < before
        assert host.descriptors.read_at(fd, 4, 32766) == b"\0\0xx"
        with pytest.raises(OSError, match="Invalid"):
            host.descriptors.punch_hole(fd, -1, 1)
    finally:
        host.descriptors.close(fd)


async def test_no_write_is_missed_between_reading_and_waiting(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with host.watches.open(path) as watch, trio.fail_after(5):
        with path.open("ab") as file:
            file.write(b"1")
        await watch.wait()
        with trio.move_on_after(0.01) as scope:
            await watch.wait()
        assert scope.cancelled_caught, "one write wakes up once"
        with path.open("ab") as file:
            file.write(b"2")
        await watch.wait()


async def test_many_watches_share_one_reader_that_may_leave(host: Host, tmp_path: Path) -> None:
    paths = [tmp_path / str(n) for n in range(5)]
    woken: list[int] = []
    scopes = [trio.CancelScope() for _ in paths]

    async def follow(number: int) -> None:
        with host.watches.open(paths[number]) as watch, scopes[number]:
            await watch.wait()
            woken.append(number)

    for path in paths:
        path.touch()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(follow, number)
            await trio.testing.wait_all_tasks_blocked()
            # Whoever it is that reads for all, two of them leave.
            scopes[0].cancel()
            scopes[1].cancel()
            await trio.testing.wait_all_tasks_blocked()
            for number in (3, 2, 4):
                paths[number].write_bytes(b"x")
    assert sorted(woken) == [2, 3, 4]
    assert isinstance(host.watches, LinuxWatches)
    assert host.watches._inotify is None


async def test_two_watches_of_one_file_both_wake_up(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with host.watches.open(path) as one, host.watches.open(path) as two, trio.fail_after(5):
        path.write_bytes(b"x")
        await one.wait()
        await two.wait()


async def test_a_watched_file_may_vanish(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with host.watches.open(path) as watch, trio.fail_after(5):
        path.unlink()
        with trio.move_on_after(0.01):
            await watch.wait()
    with pytest.raises(FileNotFoundError):
        with host.watches.open(path):
            pass


async def test_what_a_process_takes_of_the_memory_is_told(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    identity = await spawn(host, tag, tmp_path, "x = b'x' * 2**26\n" + SLEEP, started)
    await until_output(host, tmp_path / "out", b"up")
    found = await host.process_memory.usage(identity, 10)
    assert 2**16 <= found.private_kb <= found.pss_kb <= found.rss_kb < 2**18
    assert abs(found.private_kb + found.shared_kb - found.rss_kb) <= 64
    with host.processes.open(identity) as process:
        process.kill()
        await process.wait()
    with pytest.raises(ProcessGone):
        await host.process_memory.usage(identity, 10)


async def test_a_process_that_holds_up_those_who_look_into_it_does_so_until_their_deadline(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity], monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = await spawn(host, tag, tmp_path, SLEEP, started)
    rollup = tmp_path / str(identity.pid) / "smaps_rollup"
    rollup.parent.mkdir()
    os.mkfifo(rollup)
    monkeypatch.setattr("volant.host._process_memory._PROC", tmp_path)
    for _ in range(3):
        with pytest.raises(trio.TooSlowError):
            await host.process_memory.usage(identity, 0.1)
    # Two threads wait, and the third caller has waited for one of them. They end now, and it goes on.
    with rollup.open("w"):
        await trio.sleep(0.1)
    monkeypatch.undo()
    assert (await host.process_memory.usage(identity, 10)).rss_kb > 0


async def test_files_that_may_grow_to_their_size_are_counted(host: Host, tmp_path: Path) -> None:
    assert host.disk.unbacked(tmp_path / "nowhere") == 0
    await host.disk.allocate(tmp_path / "full", 2**20)
    await host.disk.allocate(tmp_path / "empty", 2**22, reserve=False)
    assert host.disk.unbacked(tmp_path) == 2**22
    with (tmp_path / "empty").open("r+b") as file:
        file.write(bytes(2**16))
        file.flush()
        os.fsync(file.fileno())
    assert host.disk.unbacked(tmp_path) == 2**22 - 2**16
    assert host.machine.spare_memory_mb(tmp_path) <= host.machine.memory_available_mb() + 64
    await host.disk.allocate(tmp_path / "vast", 2**43, reserve=False)
    assert host.machine.spare_memory_mb(tmp_path) == 0
    assert host.machine.file_room_mb(tmp_path) == 0
    (tmp_path / "vast").unlink()
    (tmp_path / "inner").mkdir()
    await host.disk.allocate(tmp_path / "inner" / "empty", 2**20, reserve=False)
    assert host.disk.unbacked(tmp_path) == 2**22 - 2**16 + 2**20
    for directory in (tmp_path, tmp_path / "none"):
        assert 0 < host.machine.file_room_mb(directory) <= host.disk.free(tmp_path) // 2**20


def test_the_machine_is_measured(host: Host) -> None:
    figures = host.machine.figures()
    assert 0 <= figures.cpu_percent <= 100
    assert 0 < figures.memory_available_mb <= figures.memory_total_mb
    assert 0 <= host.machine.figures().cpu_percent <= 100
    assert host.clock.now().utcoffset() is not None
    assert host.random.new_id() != host.random.new_id()


async def test_a_program_reads_what_it_is_given_more_than_a_pipe_holds_too(host: Host, tmp_path: Path) -> None:
    given = b"0123456789abcdef" * 8192
    status, said = await host.processes.run(
        ["sh", "-c", "sha256sum; echo $(wc -c)"],
        env={"PATH": os.environ["PATH"]},
        cwd=tmp_path,
        timeout_s=10,
        stdin=given,
    )

    assert (status, said.decode().split()) == (0, [hashlib.sha256(given).hexdigest(), "-", "0"])


async def test_a_program_that_is_given_nothing_reads_nothing(host: Host, tmp_path: Path) -> None:
    status, said = await host.processes.run(["cat"], env={"PATH": os.environ["PATH"]}, cwd=tmp_path, timeout_s=10)

    assert (status, said) == (0, b"")
