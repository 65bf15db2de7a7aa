"""A command's output arrives byte for byte, and its end is never guessed."""

from __future__ import annotations

import base64

import pytest
import trio

from volant.client import Client, ConnectionLost, ExecEnd, UnexpectedAnswer

from .kit import ndjson, serving

PATH = "/api/v1/vms/demo/agent/v1/exec"


def line(stream: str, data: bytes) -> bytes:
    return b'{"stream":"%s","data":"%s"}\n' % (stream.encode(), base64.b64encode(data))


async def test_output_is_exact_however_it_is_cut() -> None:
    blob = bytes(range(256)) * 300
    wire = line("stdout", blob) + line("stderr", b"\xff\n") + b'{"exit_code":3}\n'
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"POST {PATH}"] = ndjson(*(wire[i : i + 7919] for i in range(0, len(wire), 7919)))
        async with client.vms.exec("demo", ["x", "y"], env={"A": "b"}, cwd="/", user="1:1", timeout_s=9) as process:
            pieces = [(piece.stream, piece.data) async for piece in process]
            assert process.end == ExecEnd(exit_code=3)
            assert await process.wait() == ExecEnd(exit_code=3)
    assert pieces == [("stdout", blob), ("stderr", b"\xff\n")]
    assert server.requests[0].json() == {
        "command": ["x", "y"],
        "env": {"A": "b"},
        "cwd": "/",
        "user": "1:1",
        "timeout_s": 9,
    }


async def test_a_stream_that_ends_early_is_no_success() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"POST {PATH}"] = ndjson(line("stdout", b"x"))
        async with client.vms.exec("demo", ["x"]) as process:
            with pytest.raises(ConnectionLost, match="before the command did"):
                await process.wait()


@pytest.mark.parametrize("wire", [b"{}\n", b"nonsense\n", b'{"stream":"x"}\n', b"[" * 2_000_000])
async def test_malformed_output_is_refused_within_bounds(wire: bytes) -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"POST {PATH}"] = ndjson(wire)
        with pytest.raises(UnexpectedAnswer):
            async with client.vms.exec("demo", ["x"]) as process:
                await process.wait()


async def too_slow() -> None:
    with trio.fail_after(0):
        await trio.sleep_forever()


async def test_the_blocks_own_deadline_is_not_taken_for_the_daemons() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"POST {PATH}"] = ndjson(line("stdout", b"x"), b'{"exit_code":0}\n')
        with pytest.raises(trio.TooSlowError):
            async with client.vms.exec("demo", ["x"], timeout_s=5):
                await too_slow()
