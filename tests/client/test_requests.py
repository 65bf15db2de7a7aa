"""What a request gives, and what goes wrong with one, in the client's own terms."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from volant.client import (
    Client,
    ClientProblem,
    ConnectionLost,
    DeadlineExceeded,
    UnexpectedAnswer,
    Unreachable,
    _transport,
)
from volant.model import CreateVm, Problem, Status

from .kit import Request, answer, not_found, problem, send_head, serving, vm


async def test_a_problem_has_all_members_of_the_daemons_answer() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes["POST /api/v1/vms"] = problem(
            400, "invalid-request", "too little", field="memory_mb", hint="more", request_id="abc", vm="demo"
        )
        with pytest.raises(ClientProblem, match="too little") as caught:
            await client.vms.create(CreateVm(name="demo", cpu_cores=1, memory_mb=64))
    found = caught.value
    assert (found.status, found.code, found.field, found.hint) == (400, "invalid-request", "memory_mb", "more")
    assert (found.request_id, found.vm) == ("abc", "demo")


async def test_an_error_that_is_no_problem_is_one_too() -> None:
    async with serving() as server, Client(server.base_url) as client:

        async def proxy(request: object, stream: trio.abc.Stream) -> None:
            await send_head(stream, 502, Content_Length="6", X_Request_Id="r1")
            await stream.send_all(b"<html>")

        server.routes["GET /api/v1/vms"] = proxy
        with pytest.raises(ClientProblem, match="502") as caught:
            await client.vms.list()
    assert caught.value.request_id == "r1"


async def test_an_explanation_that_is_no_text_is_none() -> None:
    async with serving() as server, Client(server.base_url) as client:

        async def guest(request: object, stream: trio.abc.Stream) -> None:
            body = b'{"detail": "\xff"}'
            await send_head(stream, 409, Content_Length=str(len(body)))
            await stream.send_all(body)

        server.routes["GET /api/v1/vms/demo/agent/healthz"] = guest
        with pytest.raises(ClientProblem, match="409 without an explanation"):
            await client.vms.agent_health("demo")


async def test_defaults_are_not_sent() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes["POST /api/v1/vms"] = answer(vm(status="pending"), 201)
        made = await client.vms.create(CreateVm(name="demo", cpu_cores=1, memory_mb=256, labels={"a": "b"}))
    assert made.status is Status.PENDING
    body = server.requests[0].json()
    assert body == {"name": "demo", "cpu_cores": 1, "memory_mb": 256, "labels": {"a": "b"}}


async def test_labels_are_parameters_of_their_own() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes["GET /api/v1/vms"] = answer([vm()])
        (found,) = await client.vms.list(labels={"a": "1,2", "b": "x=y"}, status=Status.RUNNING)
    assert found.name == "demo"
    assert server.requests[0].query == [("status", "running"), ("label", "a=1,2"), ("label", "b=x=y")]


async def test_the_key_is_a_header_and_proxies_of_the_environment_are_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    async with serving() as server, Client(server.base_url, api_key="secret") as client:
        server.routes["GET /healthz"] = answer({"status": "starting"}, 503)
        assert (await client.healthz()).status == "starting"
    assert server.requests[0].headers["x-volant-api-key"] == "secret"


def test_a_system_without_options_for_keep_alive_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no TCP_KEEPIDLE."""
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"):
        monkeypatch.delattr(socket, name)
    spec = importlib.util.find_spec("volant.client._connection")
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] == fresh.KEEPALIVE


async def test_an_unreachable_daemon_is_reported_with_its_address(tmp_path: Path) -> None:
    with socket.socket() as taken:
        # Bound and not listening: nobody else gets the port.
        taken.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with Client(base) as client:
            with pytest.raises(Unreachable, match="Connection refused") as caught:
                await client.healthz()
    assert base in str(caught.value)
    assert "volantd" in (caught.value.hint or "")
    async with Client(f"unix:{tmp_path}/none") as client:
        with pytest.raises(Unreachable, match="No such file"):
            await client.healthz()


async def test_a_unix_socket_is_an_address(tmp_path: Path) -> None:
    async with serving(f"{tmp_path}/s") as server, Client(server.base_url) as client:
        server.routes["GET /healthz"] = answer({"status": "ok"})
        assert (await client.healthz()).status == "ok"
    assert server.requests[0].headers["host"] == "localhost"


@pytest.mark.parametrize("text", ["", "ftp://x", "http://", "unix:relative", "http://u:p@h", "http://h:99999", "h?x=1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        Client(text)


async def test_silence_ends_at_the_deadline() -> None:
    async with serving() as server, Client(server.base_url) as client:

        async def silent(request: object, stream: trio.abc.Stream) -> None:
            await trio.sleep_forever()

        async def drip(request: object, stream: trio.abc.Stream) -> None:
            await send_head(stream, 200, Content_Length="1000000")
            while True:
                await stream.send_all(b" ")
                await trio.sleep(0.01)

        server.routes["GET /silent"], server.routes["GET /drip"] = silent, drip
        for path in ("/silent", "/drip"):
            with pytest.raises(DeadlineExceeded):
                await client._http.send(_transport.Request("GET", path), timeout_s=0.1)


async def test_an_answer_that_breaks_off_is_a_lost_connection() -> None:
    async with serving() as server, Client(server.base_url) as client:

        async def half(request: object, stream: trio.abc.Stream) -> None:
            await send_head(stream, 200, Content_Length="1000")
            await stream.send_all(b"[")

        server.routes["GET /api/v1/vms"] = half
        with pytest.raises(ConnectionLost):
            await client.vms.list()


@pytest.mark.parametrize("body", [{"a": 1}, [{"id": "x"}], [vm(status="levitating")]])
async def test_an_answer_that_breaks_the_contract_is_an_error(body: object) -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes["GET /api/v1/vms"] = answer(body)
        with pytest.raises(UnexpectedAnswer, match="GET /api/v1/vms"):
            await client.vms.list()


async def test_a_name_never_becomes_another_path() -> None:
    async with Client("http://127.0.0.1:1") as client:
        for name in ("..", "a/b", "", "a?x", "A"):
            with pytest.raises(Problem, match="not a name"):
                await client.vms.delete(name)


@pytest.mark.parametrize("given", ["..", ".", ""])
async def test_nothing_that_is_given_becomes_another_path(given: str) -> None:
    async with serving() as server, Client(server.base_url) as client:

        async def nothing() -> AsyncIterator[bytes]:
            if given == "something":
                yield b""

        for attempt in (
            client.templates.delete(given),
            client.system.kill_orphan(given),
            client.system.adopt_orphan(given),
            client.vms.end_exec_session("demo", given),
            client.plugins.upload(given, nothing(), 0),
        ):
            with pytest.raises(Problem) as refused:
                await attempt
            assert (refused.value.status, refused.value.code) == (400, "invalid-request")
        assert server.requests == []


async def test_slashes_of_what_is_given_stay_in_their_part_of_the_path() -> None:
    async with serving() as server, Client(server.base_url) as client:
        for given in ("a/b", "../x", "a?b#c", "%2e%2e", "ü \udcff"):
            with pytest.raises(ClientProblem, match="nothing here"):
                await client.templates.delete(given)
    assert [request.path for request in server.requests] == [
        f"/api/v1/templates/{part}" for part in ("a%2Fb", "..%2Fx", "a%3Fb%23c", "%252e%252e", "%C3%BC%20%FF")
    ]


async def test_text_that_is_not_unicode_is_refused_before_it_is_sent() -> None:
    """An argument of a command line may be any bytes."""
    bad = "a\udcff"
    async with serving() as server, Client(server.base_url) as client:

        async def follow() -> None:
            async with client.events(after=bad):
                pass

        async def run() -> None:
            async with client.vms.exec("demo", [bad]):
                pass

        async def attach() -> None:
            async with client.vms.attach("demo", bad):
                pass

        for attempt in (
            client.vms.create(CreateVm(name="demo", labels={"a": bad})),
            client.vms.list(labels={"a": bad}),
            follow(),
            run(),
            attach(),
        ):
            with pytest.raises(Problem, match="not Unicode") as refused:
                await attempt
            assert refused.value.status == 400
        assert server.requests == []


async def test_a_wait_continues_until_its_timeout() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes["POST /api/v1/vms/demo/restart"] = answer(vm(status="stopping"), Volant_Wait="timeout")
        server.routes["GET /api/v1/vms/demo"] = [
            answer(vm(status="starting"), Volant_Wait="timeout"),
            answer(vm(), Volant_Wait="met"),
        ]
        waited = await client.vms.apply_and_wait("demo", "restart", ["running"], timeout_s=5)
        server.routes["GET /api/v1/vms/demo"] = answer(vm(status="starting"), Volant_Wait="timeout")
        late = await client.vms.wait("demo", timeout_s=0.05)
    assert waited.outcome == "met"
    assert late.outcome == "timeout"
    assert late.vm is not None
    assert late.vm.status is Status.STARTING
    assert server.requests[0].query == [("wait", "running"), ("timeout", "5s")]


async def test_a_wait_for_a_deletion_ends_if_there_is_no_such_vm() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes["GET /api/v1/vms/demo"] = not_found
        assert (await client.vms.wait("demo", ["deleted"])).outcome == "met"
        with pytest.raises(ClientProblem, match="nothing here"):
            await client.vms.wait("demo", ["running"])


PLUGIN = {
    "name": "p", "version": "1", "description": "", "runtime": "base", "enabled": True, "builtin": False,
    "created_at": None, "labels": {},
}  # fmt: skip


async def break_off(request: Request, stream: trio.abc.Stream) -> None:
    """The connection ends before the answer."""
    del request
    await stream.aclose()


async def test_a_change_is_sent_again_under_its_key_when_the_connection_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_transport, "_AGAIN_PAUSE_S", 0.01)
    async with serving() as server, Client(server.base_url) as client:
        busy = problem(409, "idempotency-key-in-use", "under way")
        server.routes["POST /api/v1/vms"] = [break_off, busy, break_off, answer(vm(), 201)]
        await client.vms.create(CreateVm(name="demo", cpu_cores=1, memory_mb=256))
        server.routes["POST /api/v1/vms/demo/restart"] = [break_off, answer(vm(), Volant_Wait="met")]
        await client.vms.apply_and_wait("demo", "restart", ["running"], idempotency_key="mine")
        server.routes["POST /api/v1/plugins"] = [answer(PLUGIN, 201)]
        await client.plugins.install({"name": "p", "version": "1"})
    keys = [request.headers["idempotency-key"] for request in server.requests]
    assert len(set(keys[:4])) == 1
    assert keys[4:6] == ["mine", "mine"]
    assert len(set(keys)) == 3
    assert len({(request.head, request.body) for request in server.asked("/api/v1/vms")}) == 1


async def test_repeating_a_request_ends_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transport, "_AGAIN_PAUSE_S", 0.01)
    monkeypatch.setattr(_transport, "_AGAIN_S", 0.1)
    async with serving() as server, Client(server.base_url) as client:
        server.routes["POST /api/v1/vms/demo/start"] = break_off
        with pytest.raises(ConnectionLost):
            await client.vms.start("demo")
        assert len(server.requests) > 1
        # What was refused is refused; one that somebody else sends is theirs.
        server.routes["POST /api/v1/vms/demo/start"] = problem(409, "idempotency-key-in-use", "under way")
        with pytest.raises(ClientProblem, match="under way"):
            await client.vms.start("demo", idempotency_key="theirs")
        with pytest.raises(Problem, match="visible ASCII"):
            await client.vms.start("demo", idempotency_key="two words")
