"""Consoles and ports of a guest work through `volar` and sockets, and after the daemon was killed."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import trio

from tests.processes import killed_after
from tests.system.kit import BOOT_S, REPOSITORY, Daemon, adopted, boot, reachable, run, spec, until
from volant.client import Client, ClientProblem, Console, Reconnected

PORT = 7007
ANSWER_S = 60.0
PANIC = "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 60"
SLEEP = b"sh -c 'echo asleep; exec sleep 1000'\r"
"""A shell takes keys, even Ctrl-C, as input until the command runs; so the command prints when it runs."""


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[Client]:
    """A daemon with a VM `desk`, which the tests of this module share."""
    async with daemon.client() as connected:
        if "desk" not in daemon.kept:
            daemon.kept.add("desk")
            await boot(connected, "desk")
            await run(connected, "desk", "sh", "-c", f"setsid nc -ll -p {PORT} -e cat </dev/null >/dev/null 2>&1 &")
        yield connected


async def read_until(console: Console, pattern: bytes) -> bytes:
    seen = b""
    with trio.move_on_after(ANSWER_S):
        while not re.search(pattern, seen):
            piece = await console.receive()
            assert isinstance(piece, bytes | Reconnected), piece
            seen += piece if isinstance(piece, bytes) else b""
    assert re.search(pattern, seen), seen
    return seen


async def test_the_guests_shell_answers_typed_lines(client: Client) -> None:
    async with client.vms.console("desk", write=True) as console, client.vms.console("desk", tail=0) as onlooker:
        await console.send(b"\r")
        await read_until(console, rb"# ")
        await console.send(b"echo $((6*7))\r")
        assert b"42" in await read_until(console, rb"\n42\r\n")
        await read_until(onlooker, rb"\n42\r\n")
        await console.send(SLEEP)
        await read_until(console, rb"\nasleep\r\n")
        await console.send(b"\x03")
        await read_until(console, rb"# ")
        await console.send(b"echo $?-\r")
        await read_until(console, rb"\n130-")
        await console.send(b"exit\r")
        # The next shell waits for Enter, without a visible sign.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(knock, console)
            await read_until(console, rb"built-in shell(.|\n)*# ")
            nursery.cancel_scope.cancel()
    with trio.fail_after(ANSWER_S):
        async with client.vms.logs("desk", streams=["console"], follow=False) as lines:
            assert "42" in [item.line async for item in lines if hasattr(item, "line")]


async def knock(console: Console) -> None:
    while True:
        await console.send(b"\r")
        await trio.sleep(0.5)


def ask(path: str, typed: bytes, pattern: bytes) -> bytes:
    """Types at a Unix socket, and reads until the answer."""
    with socket.socket(socket.AF_UNIX) as plug:
        plug.settimeout(ANSWER_S)
        plug.connect(path)
        plug.sendall(typed)
        seen = b""
        while not re.search(pattern, seen):
            data = plug.recv(4096)
            assert data, seen
            seen += data
        return seen


async def test_the_socket_in_the_view_is_the_console(client: Client) -> None:
    vm = await client.vms.get("desk")
    assert vm.serial_socket is not None
    seen = await trio.to_thread.run_sync(ask, vm.serial_socket, b"echo $((6*70))\r", rb"\n420\r\n")
    assert b"420" in seen


class Terminal:
    """A `volar` in a terminal."""

    def __init__(self, daemon: Daemon, *words: str) -> None:
        self.fd, theirs = pty.openpty()
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.process = subprocess.Popen(
            [sys.executable, "-m", "volant.cli.main", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "VOLANT_API_BASE": daemon.base_url, "TERM": "xterm"},
            cwd=REPOSITORY,
            start_new_session=True,
        )
        self.seen = b""

    def expect(self, pattern: bytes) -> None:
        deadline = time.monotonic() + ANSWER_S
        while not (found := re.search(pattern, self.seen)):
            readable, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, self.seen
            self.seen += os.read(self.fd, 4096)
        self.seen = self.seen[found.end() :]

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def is_as_before(self) -> bool:
        return termios.tcgetattr(self._theirs) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.fd)
        os.close(self._theirs)


@contextmanager
def terminal(daemon: Daemon, *words: str) -> Iterator[Terminal]:
    at = Terminal(daemon, *words)
    try:
        yield at
    finally:
        at.close()


async def test_volar_attaches_to_the_console_and_restores_the_terminal(daemon: Daemon, client: Client) -> None:
    def sit() -> None:
        with terminal(daemon, "vms", "console", "desk", "--tail", "0") as at:
            at.expect(rb"Ctrl-\] leaves")
            at.type(b"\recho $((6*700))\r")
            at.expect(rb"\n4200\r\n")
            assert not at.is_as_before()
            at.type(SLEEP)
            at.expect(rb"\nasleep\r\n")
            at.type(b"\x03")
            at.expect(rb"# ")
            at.type(b"echo $((6*701))\r")
            at.expect(rb"\n4206\r\n")
            at.type(b"\x1d")
            assert at.process.wait(ANSWER_S) == 0
            assert at.is_as_before()
        with terminal(daemon, "vms", "console", "desk", "--tail", "0") as at:
            at.expect(rb"Ctrl-\] leaves")
            at.type(b"echo $((6*702))\r")
            at.expect(rb"\n4212\r\n")
            at.process.send_signal(signal.SIGTERM)
            assert at.process.wait(ANSWER_S) == 128 + signal.SIGTERM
            assert at.is_as_before()

    await trio.to_thread.run_sync(sit)


async def test_a_port_is_a_stream_with_two_ends(client: Client) -> None:
    data = os.urandom(300_000)
    async with client.vms.tcp("desk", PORT) as stream:
        got = b""
        with trio.fail_after(ANSWER_S):
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await stream.send_all(data)
                    await stream.send_eof()

                nursery.start_soon(send)
                while piece := await stream.receive_some():
                    got += piece
    assert got == data
    with pytest.raises(ClientProblem) as refused:
        async with client.vms.tcp("desk", PORT + 1):
            pytest.fail("nobody listens there")
    assert refused.value.status == 502


def exchange(stream: socket.socket, data: bytes) -> None:
    stream.sendall(data)
    assert stream.recv(len(data)) == data


def forward(daemon: Daemon) -> None:
    command = [sys.executable, "-m", "volant.cli.main", "vms", "forward", "desk", f"0:{PORT}", f"0:{PORT + 1}"]
    environ = {**os.environ, "VOLANT_API_BASE": daemon.base_url}
    with subprocess.Popen(
        command, env=environ, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        with killed_after(2 * ANSWER_S, process):
            try:
                assert process.stdout is not None
                assert process.stderr is not None
                first, second = process.stdout.readline(), process.stdout.readline()
                found = re.fullmatch(rf"127\.0\.0\.1:(\d+)( and \[::1\]:\1)? -> port {PORT} of desk\n", first)
                assert found, first
                dead = re.match(r"127\.0\.0\.1:(\d+)", second)
                assert dead, second
                port = int(found[1])
                with socket.create_connection(("127.0.0.1", port), ANSWER_S) as one:
                    with socket.create_connection(("::1" if found[2] else "127.0.0.1", port), ANSWER_S) as two:
                        exchange(one, b"one")
                        exchange(two, b"two")
                        exchange(one, b"more")
                        for stream in (one, two):
                            stream.shutdown(socket.SHUT_WR)
                            assert stream.recv(1) == b""
                with socket.create_connection(("127.0.0.1", int(dead[1])), ANSWER_S) as nobody:
                    with pytest.raises(ConnectionResetError):
                        nobody.recv(1)
                assert "nothing answers on port" in process.stderr.readline()
                process.send_signal(signal.SIGINT)
                assert process.wait(ANSWER_S) == 130
                assert process.stderr.read() == ""
            finally:
                process.kill()


async def test_volar_forwards_many_connections_on_both_loopbacks(daemon: Daemon, client: Client) -> None:
    del client
    await trio.to_thread.run_sync(forward, daemon)


async def to_the_end(console: Console) -> None:
    async for _ in console:
        pass


async def test_consoles_work_after_the_daemon_was_killed_and_end_with_the_vm(daemon: Daemon, client: Client) -> None:
    vm = await client.vms.get("desk")
    assert vm.serial_socket is not None
    plug = trio.Path(vm.serial_socket)
    port = int(daemon.base_url.rpartition(":")[2])
    async with client.vms.console("desk", write=True, tail=0) as console:
        await console.send(b"echo $((6*7000))\r")
        await read_until(console, rb"\n42000\r\n")
        daemon.kill()
        assert await plug.exists()
        listen = daemon.command.index("--listen") + 1
        daemon.command[listen] = f"127.0.0.1:{port}"
        daemon.start()
        await adopted(client)
        with trio.fail_after(ANSWER_S):
            while not isinstance(await console.receive(), Reconnected):
                pass
        await console.send(b"echo $((6*7001))\r")
        await read_until(console, rb"\n42006\r\n")
        assert (await client.vms.get("desk")).serial_socket == vm.serial_socket
        seen = await trio.to_thread.run_sync(ask, vm.serial_socket, b"", rb"42006\r\n")
        assert b"# " in seen
        await reachable(client, "desk")
        async with client.vms.tcp("desk", PORT) as stream:
            with trio.fail_after(ANSWER_S):
                await stream.send_all(b"again")
                assert await stream.receive_some() == b"again"
            daemon.kept.clear()
            await client.vms.stop("desk", grace_s=0)
            # A killed guest has no time to close its streams.
            with trio.fail_after(BOOT_S), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        with trio.fail_after(BOOT_S):
            await to_the_end(console)
        assert console.end in ("the VM is stopping", "the VM is stopped")
    await until(client, "desk", "stopped")
    assert not await plug.exists()
    assert (await client.vms.get("desk")).serial_socket is None
    with pytest.raises(ClientProblem) as refused:
        async with client.vms.console("desk"):
            pytest.fail("it is stopped")
    assert refused.value.status == 409


async def test_a_first_line_from_a_pipe_runs_and_powers_the_guest_off(daemon: Daemon) -> None:
    async with daemon.client() as client:
        # Nothing has been typed at this console before.
        await boot(client, "piped")
        environ = daemon.environ | {"VOLANT_API_BASE": daemon.base_url}
        with trio.fail_after(BOOT_S):
            done = await trio.run_process(
                [sys.executable, "-m", "volant.cli.main", "vms", "console", "piped"],
                stdin=b"poweroff\n",
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=environ,
                cwd=REPOSITORY,
            )
        assert done.returncode == 0, done
        assert b"volar: the VM is stop" in done.stderr
        await client.vms.delete("piped")


async def test_a_guest_that_panics_during_a_command_is_reported_as_that(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await client.vms.create(spec("panics"))
        # The VM is still starting: the command waits.
        with trio.fail_after(2 * BOOT_S):
            done = await trio.run_process(
                [sys.executable, "-m", "volant.cli.main", "vms", "exec", "panics", "--", "sh", "-c", PANIC],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=daemon.environ | {"VOLANT_API_BASE": daemon.base_url},
                cwd=REPOSITORY,
            )
        assert done.returncode == 125, done
        assert b"VM 'panics' crashed: " in done.stderr
        assert b"panic" in done.stderr
        await client.vms.delete("panics")
