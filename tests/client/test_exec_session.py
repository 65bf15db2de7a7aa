"""The client talks to commands of the agent itself, leaves them and finds them again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import trio

from tests.guest.proxy import Behind, agent_behind
from volant.client import Client, ClientProblem, ConnectionLost, ExecEnd, ExecGap, ExecOutput, ExecSession
from volant.guest import _exec_session
from volant.guest._workload import check_spec


@pytest.fixture
def agent() -> Iterator[Behind]:
    with agent_behind() as behind:
        yield behind


async def read(session: ExecSession, *, until: bytes = b"\0never") -> dict[str, bytes]:
    found = {"stdout": b"", "stderr": b""}
    with trio.fail_after(20):
        async for piece in session:
            assert isinstance(piece, ExecOutput)
            found[piece.stream] += piece.data
            if until in found["stdout"]:
                break
    return found


async def test_a_session_has_input_output_and_an_end(agent: Behind) -> None:
    data = os.urandom(3_000_000)
    async with Client(agent.base_url) as client:
        script = ["sh", "-c", "echo $A $PWD >&2; cat; exit 4"]
        async with client.vms.exec_session("demo", script, env={"A": "b"}, cwd="/tmp") as session:
            async with trio.open_nursery() as nursery:

                async def write() -> None:
                    await session.send(data)
                    await session.send_eof()

                nursery.start_soon(write)
                assert await read(session) == {"stdout": data, "stderr": b"b /tmp\n"}
            assert session.end == ExecEnd(exit_code=4)
            assert session.position == len(data) + 7
            assert session.id is None


async def test_a_terminal_and_signals(agent: Behind) -> None:
    async with Client(agent.base_url) as client:
        script = "stty size; trap 'stty size' WINCH; echo up; while :; do sleep 0.05; done"
        async with client.vms.exec_session("demo", ["sh", "-c", script], tty=True, rows=5, cols=6) as session:
            assert (await read(session, until=b"up"))["stdout"].startswith(b"5 6\r\n")
            await session.resize(7, 8)
            await read(session, until=b"7 8\r\n")
            await session.signal(signal.SIGKILL)
            await read(session)
            assert session.end == ExecEnd(signal=9)


async def test_a_request_error_is_the_end_of_the_session(agent: Behind) -> None:
    async with Client(agent.base_url) as client:
        for detach in (False, True):
            async with client.vms.exec_session("demo", ["/no/such"], detach=detach) as session:
                await read(session)
                assert session.end is not None
                assert session.end.code == "not_found"
                assert session.id is None


async def test_a_detached_command_is_found_again_by_position(agent: Behind) -> None:
    async with Client(agent.base_url) as client:
        script = ["sh", "-c", "echo one; read go; echo two; exit 5"]
        async with client.vms.exec_session("demo", script, detach=True) as session:
            await read(session, until=b"one\n")
            identifier, position = session.id, session.position
            assert identifier is not None
            agent.cut()
            with pytest.raises(ConnectionLost):
                await read(session)
        (listed,) = await client.vms.exec_sessions("demo")
        assert (listed.id, listed.end, listed.position, listed.tty) == (identifier, None, 4, False)
        async with client.vms.attach("demo", identifier, position=position) as session:
            await session.send(b"go\n")
            assert (await read(session))["stdout"] == b"two\n"
            assert session.end == ExecEnd(exit_code=5)
        async with client.vms.attach("demo", identifier) as session:
            assert (await read(session))["stdout"] == b"one\ntwo\n"
        await client.vms.end_exec_session("demo", identifier)
        with pytest.raises(ClientProblem, match=identifier):
            async with client.vms.attach("demo", identifier):
                pass


async def test_settle_returns_once_the_guest_has_all_input(agent: Behind) -> None:
    async with Client(agent.base_url) as client:
        async with client.vms.exec_session("demo", ["wc", "-c"], detach=True) as session:
            await session.send(bytes(2_000_000))
            await session.send_eof()
            await session.settle()
            identifier = session.id
        assert identifier is not None
        async with client.vms.attach("demo", identifier) as session:
            assert (await read(session))["stdout"].strip() == b"2000000"


async def test_a_gap_and_a_takeover_are_reported(agent: Behind) -> None:
    async with Client(agent.base_url) as client:
        script = ["sh", "-c", "read go; head -c 1500000 /dev/zero; echo; echo end; read go"]
        async with client.vms.exec_session("demo", script, detach=True) as first:
            assert first.id is not None
            await first.send(b"go\n")
            await read(first, until=b"end")
            async with client.vms.attach("demo", first.id, position=100) as second:
                with pytest.raises(ClientProblem) as taken:
                    await read(first)
                assert taken.value.status == 409
                piece = await anext(second)
                assert isinstance(piece, ExecGap)
                assert piece.gap.first == 100
                assert second.position == piece.gap.last + 1
                assert 1_500_005 - second.position <= _exec_session.KEPT_BYTES
                await read(second, until=b"end")
                await second.send(b"go\n")
                await read(second)
                assert second.end == ExecEnd(exit_code=0)


async def test_leaving_the_block_ends_a_command_that_is_not_detached(agent: Behind) -> None:
    async with Client(agent.base_url) as client:
        async with client.vms.exec_session("demo", ["sh", "-c", "echo $$; exec sleep 1000"]) as session:
            pid = int((await read(session, until=b"\n"))["stdout"])
            watched = os.pidfd_open(pid)
        try:
            with trio.fail_after(20):
                await trio.lowlevel.wait_readable(watched)
        finally:
            os.close(watched)


async def test_a_workload_that_waits_for_its_client_is_started_by_it(agent: Behind) -> None:
    workload = {
        "entrypoint": ["sh", "-c", "echo $A; read line; echo $line; exit 5"],
        "attach": True,
        "restart": "never",
    }
    agent.server.workload.begin(check_spec(workload), agent.server.plugin)
    async with Client(agent.base_url) as client:
        async with client.vms.attach_workload("demo", env={"A": "one"}) as session:
            assert (await read(session, until=b"one\n"))["stdout"] == b"one\n"
            assert (session.id, session.tty) == ("workload", False)
        async with client.vms.attach("demo", "workload", position=4) as session:
            await session.send(b"two\n")
            assert (await read(session))["stdout"] == b"two\n"
            assert session.end == ExecEnd(exit_code=5)
        async with client.vms.attach_workload("demo") as session:
            assert session.end is not None
            assert session.end.code == "invalid_request"
