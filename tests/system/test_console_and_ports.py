"""Consoles and ports of a guest work through `volar` and sockets, and after the daemon was killed."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, adopted, boot, reachable, run, until
from volant.client import Client, ClientProblem, Console, Reconnected

PORT = 7007
ANSWER_S = 60.0
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
