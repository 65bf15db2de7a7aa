"""An action's answer is the workload's, whatever its status; an error of the daemon is an exception."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from volant.client import Client, ClientProblem, UnexpectedAnswer
from volant.model import Problem

from .kit import Handler, Request, answer, problem, send_head, serving, vm

PATH = "/api/v1/vms/demo/actions/web/shot"


def guests(body: bytes, status: int = 200) -> Handler:
    """What a guest answers, with the daemon's mark on it beside a policy of its own."""

    async def handler(request: Request, stream: trio.abc.Stream) -> None:
        del request
        policy = "default-src 'self', sandbox"
        await send_head(stream, status, Content_Length=str(len(body)), Content_Security_Policy=policy)
        await stream.send_all(body)

    return handler


async def test_the_plugin_is_looked_up_unless_it_is_given() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes["GET /api/v1/vms/demo"] = answer(vm(plugin="web"))
        server.routes[f"POST {PATH}"] = guests(b"done")
        for plugin, requests in ((None, 2), ("web", 1)):
            server.requests.clear()
            async with client.vms.call_action("demo", "shot", {"a": 1}, query={"b": "c d"}, plugin=plugin) as got:
                assert (got.status, await got.read()) == (200, b"done")
            assert len(server.requests) == requests
            assert server.requests[-1].json() == {"a": 1}
            assert server.requests[-1].query == [("b", "c d")]


@pytest.mark.parametrize("status", [400, 404, 409, 500, 502])
async def test_an_error_of_the_workload_is_an_answer_and_one_of_the_daemon_a_problem(status: int) -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"POST {PATH}"] = guests(b"no", status)
        async with client.vms.call_action("demo", "shot", plugin="web") as got:
            assert (got.status, got.is_success, await got.read()) == (status, False, b"no")
        server.routes[f"POST {PATH}"] = problem(status, "some-code", "why")
        with pytest.raises(ClientProblem, match="why") as caught:
            async with client.vms.call_action("demo", "shot", plugin="web"):
                pass
    assert caught.value.status == status


async def test_an_answer_is_read_within_bounds() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"POST {PATH}"] = guests(b"x" * 1000)
        async with client.vms.call_action("demo", "shot", plugin="web") as got:
            with pytest.raises(UnexpectedAnswer, match="999"):
                await got.read(999)


async def test_a_body_in_pieces_is_sent_in_chunks() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"

    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"POST {PATH}"] = guests(b"")
        async with client.vms.call_action("demo", "shot", content=pieces(), content_type="x/y", plugin="web") as got:
            assert got.status == 200
    assert server.requests[0].headers["transfer-encoding"] == "chunked"
    assert server.requests[0].headers["content-type"] == "x/y"


async def test_names_are_checked_before_they_become_paths() -> None:
    async with serving() as server, Client(server.base_url) as client:
        for name, action, plugin in (("a/b", "x", "y"), ("a", "../x", "y"), ("a", "x", "y/z")):
            with pytest.raises(Problem):
                async with client.vms.call_action(name, action, plugin=plugin):
                    pass
    assert not server.requests
