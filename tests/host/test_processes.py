"""Processes outlive the daemon, and are found, watched and ended by their identity."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Never

import pytest
import trio
import trio.testing

from tests.host.kit import SLEEP, spawn, until_output
from volant.host import Host, ProcessGone, Sandbox, _procfs
from volant.host._priorities import SPARE
from volant.model import ProcessIdentity


async def test_a_process_is_spawned_so_that_it_outlives_the_daemon(
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
    with host.processes.open(identity) as process, trio.fail_after(20):
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

    with trio.fail_after(20):
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


async def test_an_unwatched_child_keeps_its_status_for_a_later_handle(
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


async def test_a_cancelled_wait_does_not_wake_the_waiter_of_another_process(
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


async def test_a_process_is_spawned_once_its_command_line_is_there(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel lets the parent go on before it sets the arguments. Another process would not find the tag."""
    real, seen = _procfs.command_line, list[bytes]()

    def late(pid: int) -> bytes:
        seen.append(real(pid) if len(seen) >= 3 else b"")
        return seen[-1]

    monkeypatch.setattr(_procfs, "command_line", late)
    await spawn(host, tag, tmp_path, SLEEP, started)
    assert tag in _procfs.tokens(seen[-1])


async def test_an_adopted_process_is_found_by_its_tag_and_watched(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    # The middle process starts it and goes, as a daemon that was killed does.
    code = (
        "import subprocess, sys\n"
        f"argv = [sys.executable, '-c', {SLEEP!r}, 'guest={tag},x=y']\n"
        "process = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.PIPE)\n"
        "process.stdout.readline()\n"
    )
    with trio.fail_after(60):
        await trio.run_process([sys.executable, "-c", code], stdout=None)
        identity = await host.processes.find(tag)
        assert identity is not None
        started.append(identity)
        assert [i for i in await host.processes.scan("volant-test.") if i.tag == tag] == [identity]
        with host.processes.open(identity) as process:
            process.kill()
            assert await process.wait() is None
        assert await host.processes.find(tag) is None


async def test_wakeups_of_all_threads_are_counted(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    code = """
import threading, time
def wake_up():
    for _ in range(100):
        time.sleep(0.001)
    print("done", flush=True)
    time.sleep(60)
threading.Thread(target=wake_up).start()
"""
    identity = await spawn(host, tag, tmp_path, code, started)
    await until_output(host, tmp_path / "out", b"done")
    assert host.proc.wakeups(identity) >= 100
    with host.processes.open(identity) as process:
        process.kill()
        await process.wait()
    with pytest.raises(ProcessGone):
        host.proc.wakeups(identity)


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


@pytest.mark.parametrize("shortage", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_a_process_is_not_taken_for_gone_on_a_host_short_of_descriptors_or_memory(
    host: Host,
    tag: str,
    tmp_path: Path,
    started: list[ProcessIdentity],
    monkeypatch: pytest.MonkeyPatch,
    shortage: int,
) -> None:
    identity = await spawn(host, tag, tmp_path, SLEEP, started)
    # The kernel shows no command line for a moment while a program is loaded.
    await until_output(host, tmp_path / "out", b"up")
    stranger = Host()
    said = os.strerror(shortage)

    def refuse(pid: int) -> Never:
        raise OSError(shortage, said)

    with monkeypatch.context() as patch:
        patch.setattr(_procfs, "command_line", refuse)
        with pytest.raises(OSError, match=said):
            await stranger.processes.find(tag)
        with pytest.raises(OSError, match=said):
            stranger.processes.open(identity)
        with pytest.raises(OSError, match=said):
            host.proc.command_line(identity)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", refuse)
        with pytest.raises(OSError, match=said):
            stranger.processes.open(identity)
    assert await stranger.processes.find(tag) == identity
    stranger.processes.open(identity).close()


async def test_a_tag_must_be_on_the_command_line(host: Host, tmp_path: Path) -> None:
    for argv, tag in ([sys.executable, "-c", ""], "volant-x"), ([sys.executable, "a b"], "a b"):
        with pytest.raises(ValueError, match="tag"):
            await host.processes.spawn(argv, tag=tag, env={}, cwd=tmp_path, stdout_path=tmp_path / "out")


async def test_a_missing_program_is_an_os_error(host: Host, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await host.processes.spawn(
            ["/no/such/program", "volant-test"], tag="volant-test", env={}, cwd=tmp_path, stdout_path=tmp_path / "out"
        )


async def test_the_stdin_of_a_program_may_exceed_a_pipe(host: Host, tmp_path: Path) -> None:
    given = b"0123456789abcdef" * 8192
    status, said = await host.processes.run(
        ["sh", "-c", "sha256sum; echo $(wc -c)"],
        env={"PATH": os.environ["PATH"]},
        cwd=tmp_path,
        timeout_s=10,
        stdin=given,
    )

    assert (status, said.decode().split()) == (0, [hashlib.sha256(given).hexdigest(), "-", "0"])


async def test_a_program_without_stdin_reads_nothing(host: Host, tmp_path: Path) -> None:
    status, said = await host.processes.run(["cat"], env={"PATH": os.environ["PATH"]}, cwd=tmp_path, timeout_s=10)

    assert (status, said) == (0, b"")


async def test_the_use_of_a_process_is_measured(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    code = """
import time
end = time.process_time() + 0.2
while time.process_time() < end:
    pass
print("done", flush=True)
time.sleep(60)
"""
    identity = await spawn(host, tag, tmp_path, code, started)
    await until_output(host, tmp_path / "out", b"done")
    used = host.proc.usage(identity)
    assert 0.15 <= used.cpu_s < 20
    assert 1024 < used.rss_kb < 2**20
    assert used.read_bytes >= 0
    assert used.written_bytes >= 0
    with host.processes.open(identity) as process:
        process.kill()
        await process.wait()
    with pytest.raises(ProcessGone):
        host.proc.usage(identity)


def test_the_bytes_of_network_interfaces_are_measured(host: Host) -> None:
    def loopback() -> tuple[int, int]:
        return host.machine.interface_bytes()["lo"]

    before = loopback()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(bytes(1000), ("127.0.0.1", 9))
    assert all(now - then >= 1000 for then, now in zip(before, loopback(), strict=True))


def score(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_a_process_is_the_first_to_go_until_a_vm_uses_it(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    identity = await spawn(host, tag, tmp_path, SLEEP, started)
    assert score(identity.pid) == SPARE
    await host.limits.apply(identity, "a test")
    assert score(identity.pid) == max(0, score("self"))
    await host.limits.apply(identity, "a test")
    assert score(identity.pid) == max(0, score("self"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process another user")
async def test_so_is_one_of_another_user(host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]) -> None:
    user = 65540
    host = Host(users=range(user, user + 1))
    identity = await host.processes.spawn(
        ["/usr/bin/python3", "-Ic", SLEEP, tag], tag=tag, env={}, cwd=tmp_path, stdout_path=tmp_path / "out",
        sandbox=Sandbox(user=user),
    )  # fmt: skip
    started.append(identity)
    await until_output(host, tmp_path / "out", b"up")
    assert host.proc.status(identity).user == user
    assert score(identity.pid) == SPARE
    await host.limits.apply(identity, "a test")
    assert score(identity.pid) == max(0, score("self"))
