"""`volar vms forward`: connections here are connections in the guest, their ends and their breaks too."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from tests.api.test_relay import guest
from tests.api.test_tcp import digest_at_the_end, listening
from tests.cli.kit import running, volar
from tests.ports import free_port


def server_of(at: Any) -> Any:
    return SimpleNamespace(base_url=f"http://127.0.0.1:{at.api.server.port}")


async def line(stream: trio.abc.ReceiveStream | None) -> str:
    assert stream is not None
    data = b""
    while not data.endswith(b"\n"):
        piece = await stream.receive_some(1)
        assert piece, data
        data += piece
    return data.decode()


async def test_bytes_and_half_closes_pass_through_a_forwarded_port(tmp_path: Path) -> None:
    async with guest(tmp_path) as at, listening(digest_at_the_end) as port:
        async with running(server_of(at), ["vms", "forward", "--json", "demo", f"0:{port}"]) as process:
            told = json.loads(await line(process.stdout))
            assert (told["vm"], told["port"]) == ("demo", port)
            here = int(told["addresses"][0].rpartition(":")[2])
            streams = [await trio.open_tcp_stream("127.0.0.1", here) for _ in range(5)]
            for number, stream in enumerate(streams):
                await stream.send_all(b"%d" % number * 100_000)
            for number, stream in enumerate(streams):
                await stream.send_eof()
                got = b""
                while piece := await stream.receive_some():
                    got += piece
                assert got == hashlib.sha256(b"%d" % number * 100_000).digest()
                await stream.aclose()
            process.terminate()


async def test_an_unreachable_port_resets_connections_and_is_reported_once(tmp_path: Path) -> None:
    nobody = free_port()
    async with guest(tmp_path) as at:
        async with running(server_of(at), ["vms", "forward", "demo", f"0:{nobody}"]) as process:
            here = int((await line(process.stdout)).split()[0].rpartition(":")[2])
            for _ in range(2):
                async with await trio.open_tcp_stream("127.0.0.1", here) as stream:
                    with pytest.raises(trio.BrokenResourceError):
                        await stream.receive_some()
            assert "nothing answers on port" in await line(process.stderr)

            async def answers(stream: trio.SocketStream) -> None:
                await stream.send_all(b"here")

            async with trio.open_nursery() as nursery:
                listeners = await trio.open_tcp_listeners(nobody, host="127.0.0.1")
                nursery.start_soon(trio.serve_listeners, answers, listeners)
                async with await trio.open_tcp_stream("127.0.0.1", here) as stream:
                    assert await stream.receive_some() == b"here"
                assert await line(process.stderr) == f"volar: port {nobody} of demo answers again\n"
                nursery.cancel_scope.cancel()
            process.terminate()


async def test_a_port_that_is_taken_here_and_a_vm_that_is_not_there_are_errors(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            done = await volar(server_of(at), "vms", "forward", "demo", f"{port}:80")
        assert done.code == 1
        assert f"can't listen on 127.0.0.1:{port}" in done.err
        assert (await volar(server_of(at), "vms", "forward", "nobody", "0:80")).code == 3
    for bad in ("0", "70000", "x:80", "1:0", "::80"):
        assert (await volar(None, "vms", "forward", "demo", bad)).code == 2
