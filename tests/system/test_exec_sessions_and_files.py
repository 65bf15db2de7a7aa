"""Commands in a real guest, interactive ones too, and copies to and from it, with `volar` and the client."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.system.kit import REPOSITORY, Daemon, load, shared_vm
from volant.client import ExecEnd, ExecGap, ExecOutput

_S = 120.0


@pytest.fixture(scope="module")
def guest(module_daemon: Daemon) -> Iterator[str]:
    """The name of a running VM, which the tests of this module share."""
    with shared_vm(module_daemon, memory_mb=load("VOLANT_TEST_FILE_GUEST_MB", usual=160, full=320)):
        yield "demo"


def command(daemon: Daemon, *words: str) -> list[str]:
    return [sys.executable, "-m", "volant.cli.main", "--api", daemon.base_url, "vms", *words]


def environ() -> dict[str, str]:
    return {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "TERM": "xterm-256color"}


def volar(daemon: Daemon, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(daemon, *words), input=stdin, capture_output=True, env=environ(), timeout=_S)


class Terminal:
    """A terminal in which `volar` runs."""

    def __init__(self, daemon: Daemon, *words: str, rows: int, cols: int) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(rows, cols)
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        self.process = subprocess.Popen(
            command(daemon, *words), stdin=theirs, stdout=theirs, stderr=theirs, env=environ(), start_new_session=True
        )
        self.seen = b""

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("4H", rows, cols, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.ours, data)

    def see(self, data: bytes) -> None:
        end = time.monotonic() + _S
        while data not in self.seen:
            assert select.select([self.ours], [], [], max(0.0, end - time.monotonic()))[0], self.seen
            self.seen += os.read(self.ours, 65536)

    def end(self) -> int:
        code = self.process.wait(_S)
        assert termios.tcgetattr(self.theirs) == self.before, "the terminal was not put back"
        return code


@contextmanager
def terminal(daemon: Daemon, *words: str, rows: int = 31, cols: int = 97) -> Iterator[Terminal]:
    made = Terminal(daemon, *words, rows=rows, cols=cols)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
            made.process.wait()
        os.close(made.ours)
        os.close(made.theirs)


def test_output_and_exit_code_of_a_command_are_volars(daemon: Daemon, guest: str) -> None:
    done = volar(daemon, "exec", guest, "--", "sh", "-c", "head -c 50000000 /dev/zero | sha256sum; echo e >&2; exit 7")
    assert (done.returncode, done.stderr) == (7, b"e\n")
    assert done.stdout == f"{hashlib.sha256(bytes(50_000_000)).hexdigest()}  -\n".encode()


async def test_a_command_that_takes_all_memory_dies_and_the_agent_does_not(daemon: Daemon, guest: str) -> None:
    async with daemon.client() as client:
        before = await client.vms.agent_health(guest)
        script = "a = []\nwhile True: a.append(bytearray(b'x' * (1 << 20)))"
        async with client.vms.exec(guest, ["python3.13", "-c", script], timeout_s=60) as process:
            end = await process.wait()
        assert end.signal == 9 or end.exit_code == 1, end
        # The same agent as before, not a restarted one.
        assert (await client.vms.agent_health(guest))["uptime_s"] > before["uptime_s"]
        assert (await client.vms.get(guest)).boots == 1


def test_a_shell_in_a_terminal(daemon: Daemon, guest: str) -> None:
    with terminal(daemon, "exec", "-it", guest, "--", "sh") as person:
        person.see(b"# ")
        person.type(b"stty size; echo T=$TERM\r")
        person.see(b"31 97\r\n")
        person.see(b"T=xterm-256color")
        person.resize(50, 132)
        os.kill(person.process.pid, signal.SIGWINCH)
        person.type(b"sleep 1; stty size\r")
        person.see(b"50 132\r\n")
        # Keys go to the guest: Ctrl-C ends the command there, but neither the shell nor volar.
        person.type(b"sh -c 'echo sleeps; exec sleep 1000'; echo code=$?\r")
        person.see(b"sleeps\r\n")
        person.type(b"\x03")
        person.type(b"echo st''ill\r")
        person.see(b"still\r\n")
        person.type(b"exit 7\r")
        assert person.end() == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_restores_the_terminal_and_ends_the_command(daemon: Daemon, guest: str, number: int) -> None:
    with terminal(daemon, "exec", "-it", guest, "--", "sh", "-c", "echo pid=$$; exec sleep 1000") as person:
        person.see(b"pid=")
        person.see(b"\r\n")
        pid = person.seen.partition(b"pid=")[2].split()[0].decode()
        os.kill(person.process.pid, number)
        assert person.end() == 128 + number
    gone = f"i=0; while kill -0 {pid} 2>/dev/null; do i=$((i+1)); [ $i = 50 ] && exit 1; sleep 0.1; done"
    assert volar(daemon, "exec", guest, "--", "sh", "-c", gone).returncode == 0


def test_input_from_a_pipe(daemon: Daemon, guest: str) -> None:
    data = os.urandom(3_000_000)
    done = volar(daemon, "exec", "-i", guest, "--", "sh", "-c", "cat; echo over >&2; exit 3", stdin=data)
    assert (done.returncode, done.stderr) == (3, b"over\n")
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    assert volar(daemon, "exec", guest, "--", "cat", stdin=b"not passed on").stdout == b""


def test_a_detached_command_survives_client_and_daemon_and_loses_no_output(daemon: Daemon, guest: str) -> None:
    script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); [ $i = 500 ] && read go; done; exit 9"

    async def until_killed() -> tuple[str, bytes]:
        async with daemon.client() as client:
            async with client.vms.exec_session(guest, ["sh", "-c", script], detach=True) as session:
                got = b""
                async for piece in session:
                    assert isinstance(piece, ExecOutput)
                    got += piece.data
                    if b"line 100\n" in got:
                        break
                assert session.id is not None
                assert session.position == len(got)
                return session.id, got

    async def again(identifier: str, got: bytes) -> bytes:
        async with daemon.client() as client, client.vms.attach(guest, identifier, position=len(got)) as session:
            await session.send(b"go\n")
            async for piece in session:
                assert not isinstance(piece, ExecGap)
                got += piece.data
            assert session.end == ExecEnd(exit_code=9)
        return got

    identifier, got = trio.run(until_killed)
    got = trio.run(again, identifier, got)
    assert got == b"".join(b"line %d\n" % i for i in range(2000))
    done = volar(daemon, "exec", "--attach", identifier, guest)
    assert done.returncode == 9
    assert done.stdout == got
    listed = volar(daemon, "sessions", guest)
    assert identifier.encode() in listed.stdout
    assert b"exit 9" in listed.stdout
    assert volar(daemon, "sessions", guest, "--end", identifier).returncode == 0
    assert volar(daemon, "exec", "--attach", identifier, guest).returncode == 125


def test_a_terminal_can_be_detached_and_attached_again(daemon: Daemon, guest: str) -> None:
    done = volar(daemon, "exec", "-dt", guest, "--", "sh")
    identifier = done.stdout.strip().decode()
    with terminal(daemon, "exec", "--attach", identifier, guest) as person:
        person.see(b"# ")
        person.type(b"X=kept; stty size\r")
        person.see(b"31 97\r\n")
        person.type(b"\x1d")
        assert person.end() == 0
        person.see(b"detached")
    with terminal(daemon, "exec", "--attach", identifier, guest) as first:
        first.type(b"echo is $X\r")
        first.see(b"is kept")
        with terminal(daemon, "exec", "--attach", identifier, guest) as second:
            second.see(b"is kept")
            assert first.end() == 125
            second.type(b"exit 5\r")
            assert second.end() == 5


def test_a_directory_is_copied_in_and_back(daemon: Daemon, guest: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "run").write_bytes(b"#!/bin/sh\necho ran\n")
    (tree / "a" / "run").chmod(0o755)
    (tree / "a" / "b" / "data").write_bytes(os.urandom(100_000))
    (tree / "link").symlink_to("a/run")
    (tree / os.fsdecode(b"caf\xe9 x")).write_bytes(b"name")
    for i in range(100):
        (tree / f"{i}").write_bytes(b"%d" % i)
    assert volar(daemon, "cp", str(tree), f"{guest}:/tmp/").returncode == 0
    ran = volar(daemon, "exec", guest, "--", "sh", "-c", "/tmp/tree/link; stat -c %u /tmp/tree/a/run")
    assert ran.stdout == b"ran\n0\n"
    done = volar(daemon, "cp", f"{guest}:/tmp/tree", str(tmp_path / "back"))
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "back") == digest(tree)
    # Also as a tar through a pipe.
    packed = volar(daemon, "cp", f"{guest}:/tmp/tree", "-").stdout
    (tmp_path / "t.tar").write_bytes(packed)
    with tarfile.open(tmp_path / "t.tar") as archive:
        assert "a/b/data" in archive.getnames()


def digest(top: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        content = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(top))] = (path.lstat().st_mode, hashlib.sha256(content).hexdigest())
    return found


def test_volar_copies_files(daemon: Daemon, guest: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    (tmp_path / "f").chmod(0o750)
    assert volar(daemon, "cp", str(tmp_path / "f"), f"{guest}:/tmp").returncode == 0
    assert volar(daemon, "cp", "-", f"{guest}:/tmp/piped", stdin=b"through a pipe").returncode == 0
    assert volar(daemon, "cp", f"{guest}:/tmp/piped", "-").stdout == b"through a pipe"
    assert volar(daemon, "cp", f"{guest}:/tmp/f", str(tmp_path / "g")).returncode == 0
    assert (tmp_path / "g").read_bytes() == b"content"
    assert (tmp_path / "g").stat().st_mode & 0o777 == 0o750
    missing = volar(daemon, "cp", f"{guest}:/no/such", str(tmp_path))
    assert missing.returncode == 3
    assert b"/no/such" in missing.stderr
    assert volar(daemon, "cp", str(tmp_path / "none"), f"{guest}:/tmp").returncode == 1
    assert volar(daemon, "cp", "a", "b").returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "g"]
