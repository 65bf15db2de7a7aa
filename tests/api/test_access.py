"""Who is let in, and that a key goes nowhere but to the comparison."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import socket
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.api.kit import FAST, UPGRADE, Answer, Api, api, request, streamed
from volant.api import create_app
from volant.http import Access, ApiSettings, parse_network, serve
from volant.http._addresses import parse_client
from volant.http._keys import TICKET_S, Keys, Tickets
from volant.model import Problem
from volant.relay._headers import from_guest, to_guest

KEY = "k3y-0123456789abcdef"
OLD = "old-0123456789abcdef"
NONE = "/api/v1/vms/none"


def problem(answer: Answer, status: int) -> dict[str, Any]:
    assert answer.status == status, answer.body
    body: dict[str, Any] = msgspec.json.decode(answer.body)
    assert (body["status"], body["error"]) == (status, body["detail"])
    return body


def networks(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(parse_network(text) for text in texts)


def scope(client: str, *forwarded: str, unix: bool = False) -> dict[str, Any]:
    headers = [(b"host", b"localhost"), *((b"x-forwarded-for", value.encode()) for value in forwarded)]
    return {
        "type": "http", "method": "GET", "raw_path": b"/api/v1/vms", "query_string": b"", "headers": headers,
        "client": None if unix else (client, 5), "server": None, "state": {"unix": unix},
    }  # fmt: skip


def is_let_in(access: Access, asked: dict[str, Any]) -> bool:
    try:
        access.check(asked)
    except Problem as refused:
        return refused.status != 403
    return True


# Networks


@pytest.mark.parametrize(
    ("client", "let_in"),
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("11.0.0.1", False),
        ("::ffff:11.0.0.1", False),
        ("192.0.2.7", True),
        ("192.0.2.8", False),
        ("2001:db8::1", True),
        ("2001:db9::1", False),
        ("fe80::1%eth0", True),
        ("198.51.100.9", True),
        ("::10.1.2.3", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_only_allowed_networks_may_send_requests(client: str, let_in: bool) -> None:
    allowed = networks("10.0.0.0/8", "192.0.2.7", "2001:db8::/32", "fe80::/10", "::ffff:198.51.100.0/120")
    assert is_let_in(Access(ApiSettings(allow_cidr=allowed)), scope(client)) == let_in


@pytest.mark.parametrize(
    ("peer", "forwarded", "let_in"),
    [
        # Not a proxy: whatever it says of others, it asks for itself.
        ("203.0.113.1", ["10.0.0.1"], False),
        ("10.0.0.1", ["203.0.113.1"], True),
        # A proxy: the last that is none.
        ("127.0.0.1", ["10.0.0.1"], True),
        ("::ffff:127.0.0.1", ["10.0.0.1"], True),
        ("127.0.0.1", ["203.0.113.1"], False),
        ("127.0.0.1", ["10.0.0.1, 203.0.113.1"], False),
        ("127.0.0.1", ["10.0.0.1", "203.0.113.1"], False),
        ("127.0.0.1", ["203.0.113.1, 10.0.0.1"], True),
        ("127.0.0.1", ["10.0.0.1, 172.16.0.1"], True),
        ("127.0.0.1", ["203.0.113.1, 172.16.0.1"], False),
        ("127.0.0.1", ["127.0.0.1, 203.0.113.1, 172.16.0.1"], False),
        ("127.0.0.1", ["10.0.0.1:5555"], True),
        ("127.0.0.1", ["[2001:db8::1]:5555"], True),
        ("127.0.0.1", ["2001:db8::1"], True),
        # Nobody knows who it is.
        ("127.0.0.1", ["10.0.0.1, unknown"], False),
        ("127.0.0.1", ["10.0.0.1, "], False),
        ("127.0.0.1", ["10.0.0.1,\xff"], False),
        # The proxy for itself, which is in no list.
        ("127.0.0.1", [], False),
        ("127.0.0.1", ["172.16.0.1"], False),
    ],
)
def test_x_forwarded_for_counts_only_from_trusted_proxies(peer: str, forwarded: list[str], let_in: bool) -> None:
    settings = ApiSettings(
        allow_cidr=networks("10.0.0.0/8", "2001:db8::/32"), trusted_proxies=networks("127.0.0.1", "172.16.0.0/12")
    )
    assert is_let_in(Access(settings), scope(peer, *forwarded)) == let_in


def test_without_trusted_proxies_x_forwarded_for_is_not_read() -> None:
    assert is_let_in(Access(ApiSettings(trusted_proxies=networks("127.0.0.1"))), scope("127.0.0.1", "nonsense"))


def test_networks_and_addresses_are_understood_or_refused() -> None:
    for text in ("10.0.0.0/8", "10.1.2.3", "2001:db8::/32", "::1", "0.0.0.0/0", "::/0"):
        assert parse_network(text)
    assert parse_network("::ffff:10.0.0.0/104") == parse_network("10.0.0.0/8")
    for text in ("", "nonsense", "10.0.0.0/33", "10.0.0.1/8", "localhost", "10.0.0.0/8/8", "1.2.3"):
        with pytest.raises(ValueError, match=text or "''"):
            parse_network(text)
    assert str(parse_client("::ffff:192.0.2.1")) == "192.0.2.1"


async def test_the_address_is_checked_first_and_on_every_route(tmp_path: Path) -> None:
    settings = ApiSettings(allow_cidr=networks("10.0.0.0/8"), api_keys=(KEY,))
    async with api(tmp_path, settings) as served:
        for path in ("/healthz", "/api/v1/vms", "/api/v1/events/vms", f"{NONE}/agent/x", "/nothing"):
            refused = problem(await served.server.get(path, Host="attacker.example"), 403)
            assert "127.0.0.1" in refused["detail"]
        problem(await served.server.get(f"/ws/v1{NONE[7:]}/logs", **UPGRADE), 403)
        problem(await served.server.get("/healthz", X_Forwarded_For="10.0.0.1"), 403)


# Keys


async def test_without_a_key_everything_but_health_is_401(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=(KEY,))) as served:
        assert (await served.server.get("/healthz")).status == 200
        for method, path in (
            ("GET", "/api/v1/vms"),
            ("POST", "/api/v1/vms"),
            ("POST", "/api/v1/tickets"),
            ("OPTIONS", "/api/v1/vms"),
            ("GET", "/api/v1/events/vms"),
            ("PATCH", "/api/v1/events/vms"),
            ("GET", f"{NONE}/agent/v1/info"),
            ("GET", f"{NONE}/ports/80/"),
            ("GET", "/nothing"),
            ("GET", "/healthz/"),
            ("GET", "//healthz"),
            ("GET", "/%68ealthz"),
        ):
            answer = await served.server.ask(request(method, path))
            problem(answer, 401)
            assert answer.headers["www-authenticate"] == 'Bearer realm="volant"'
        for path in ("/ws/v1/vms/none/logs", "/healthz", f"{NONE}/agent/v1/exec", "/ws/v1/nothing"):
            answer = await served.server.get(path, **UPGRADE)
            problem(answer, 401)
            assert "www-authenticate" in answer.headers


async def test_a_key_counts_in_either_header_and_any_of_several(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=(OLD, KEY))) as served:
        for headers, status in (
            ({"X_Volant_API_Key": KEY}, 404),
            ({"X_Volant_API_Key": OLD}, 404),
            ({"Authorization": f"Bearer {KEY}"}, 404),
            ({"Authorization": f"bearer  {KEY}"}, 404),
            ({"Authorization": "Basic eA==", "X_Volant_API_Key": KEY}, 404),
            ({"Authorization": KEY}, 401),
            ({"Authorization": f"Basic {KEY}"}, 401),
            ({"X_Volant_API_Key": KEY[:-1]}, 401),
            ({"X_Volant_API_Key": KEY + "x"}, 401),
            ({"X_Volant_API_Key": KEY.upper()}, 401),
            ({"X_Volant_API_Key": f"{OLD},{KEY}"}, 401),
            ({"X_Volant_API_Key": ""}, 401),
            ({"Cookie": f"api_key={KEY}"}, 401),
        ):
            for path in (NONE, f"{NONE}/agent/x"):
                problem(await served.server.get(path, **headers), status)
            problem(await served.server.get("/ws/v1/vms/none/logs", **UPGRADE, **headers), status)


async def test_a_key_in_the_query_counts_on_websockets_and_event_streams_alone(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=(KEY,))) as served:
        encoded = "".join(f"%{ord(letter):02x}" for letter in KEY)
        for query in (f"api_key={KEY}", f"since=0&api%5Fkey={encoded}", f"api_key=x&api_key={KEY}"):
            problem(await served.server.get(f"/ws/v1/vms/none/logs?{query}", **UPGRADE), 404)
            async with streamed(served.server, f"/api/v1/events/vms?{query}") as body:
                assert body.status == 200
            problem(await served.server.get(f"{NONE}/agent/x?{query}", Accept="text/event-stream"), 404)
            for path in (f"{NONE}?{query}", f"{NONE}/agent/x?{query}", f"{NONE}/logs?{query}", f"/api/v1/vms?{query}"):
                assert "query" in problem(await served.server.get(path), 401)["detail"]
            problem(await served.server.get(f"/api/v1/vms?{query}", Accept="text/event-stream"), 401)
            problem(await served.server.ask(request("POST", f"{NONE}/start?{query}", Accept="text/event-stream")), 401)
            problem(await served.server.ask(request("POST", f"{NONE}/agent/x?{query}")), 401)
        problem(await served.server.get("/ws/v1/vms/none/logs?api_key=wrong", **UPGRADE), 401)
        problem(await served.server.get("/ws/v1/vms/none/logs?api_key", **UPGRADE), 401)


async def test_a_ticket_opens_one_stream(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=(KEY,))) as served:

        async def ticket() -> str:
            answer = await served.server.ask(request("POST", "/api/v1/tickets", X_Volant_API_Key=KEY))
            assert (answer.status, answer.headers["cache-control"]) == (201, "no-store")
            body = msgspec.json.decode(answer.body)
            assert set(body) == {"ticket", "expires_at"}
            return str(body["ticket"])

        once = await ticket()
        problem(await served.server.get(f"/ws/v1/vms/none/logs?ticket={once}", **UPGRADE), 404)
        refused = problem(await served.server.get(f"/ws/v1/vms/none/logs?ticket={once}", **UPGRADE), 401)
        assert "/api/v1/tickets" in refused["hint"]
        # It is not used up by what is refused before, nor where it does not count.
        once = await ticket()
        foreign = {"Origin": "https://attacker.example"}
        problem(await served.server.get(f"/ws/v1/vms/none/logs?ticket={once}", **UPGRADE, **foreign), 403)
        problem(await served.server.get(f"{NONE}?ticket={once}"), 401)
        problem(await served.server.get(NONE, X_Volant_API_Key=once), 401)
        async with streamed(served.server, f"/api/v1/events/vms?ticket={once}") as body:
            assert body.status == 200
        problem(await served.server.get(f"/api/v1/events/vms?ticket={once}"), 401)
        unknown = request("POST", "/api/v1/tickets", b'{"for":"x"}', X_Volant_API_Key=KEY)
        problem(await served.server.ask(unknown), 400)


async def test_a_ticket_for_a_path_opens_that_and_what_is_below(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=(KEY,))) as served:
        logs = "/ws/v1/vms/none/logs"
        for path, asked, status in (
            (logs, logs, 404),
            ("/ws/v1/vms/none", logs, 404),
            (logs, "/ws/v1/vms/none/console", 401),
            (logs, "/ws/v1/vms/none/log", 401),
            ("/ws/v1/vms/non", logs, 401),
            (logs, "/ws/v1/agui", 401),
        ):
            body = msgspec.json.encode({"path": path})
            made = await served.server.ask(request("POST", "/api/v1/tickets", body, X_Volant_API_Key=KEY))
            ticket = msgspec.json.decode(made.body)["ticket"]
            problem(await served.server.get(f"{asked}?ticket={ticket}", **UPGRADE), status)
            problem(await served.server.get(f"{logs}?ticket={ticket}", **UPGRADE), 401)
        for body in (b'{"path":"logs"}', b'{"path":1}', b'{"other":"/"}'):
            problem(await served.server.ask(request("POST", "/api/v1/tickets", body, X_Volant_API_Key=KEY)), 400)


async def test_a_log_line_names_the_caller_and_its_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="volant.api.request")
    settings = ApiSettings(api_keys=(KEY, OLD), trusted_proxies=networks("127.0.0.1"))
    short = {key: hashlib.sha256(key.encode()).hexdigest()[:8] for key in (KEY, OLD)}
    async with api(tmp_path, settings) as served:
        await served.server.get("/api/v1/vms", X_Volant_API_Key=KEY)
        await served.server.get("/api/v1/vms", X_Volant_API_Key=OLD, X_Forwarded_For="192.0.2.7")
        await served.server.get("/api/v1/vms", X_Volant_API_Key="wrong", X_Forwarded_For="192.0.2.8")
        made = await served.server.ask(request("POST", "/api/v1/tickets", X_Volant_API_Key=OLD))
        await served.server.get(f"/ws/v1/agui?ticket={msgspec.json.decode(made.body)['ticket']}&vm=none", **UPGRADE)
    callers = [str(vars(record)["caller"]) for record in caplog.records if record.name == "volant.api.request"]
    of_old = f"127.0.0.1 key {short[OLD]}"
    assert callers == [f"127.0.0.1 key {short[KEY]}", f"192.0.2.7 key {short[OLD]}", "192.0.2.8", of_old, of_old]
    assert f" 200 from 127.0.0.1 key {short[KEY]} " in caplog.text
    assert KEY not in caplog.text


async def test_a_ticket_lasts_a_minute_and_unused_ones_are_limited(autojump_clock: MockClock) -> None:
    tickets = Tickets(limit=3)
    first, *_ = [tickets.issue() for _ in range(3)]
    with pytest.raises(Problem) as caught:
        tickets.issue()
    assert caught.value.status == 503
    await trio.sleep(TICKET_S - 1)
    assert tickets.redeem(first.encode())
    assert not tickets.redeem(first.encode())
    late = tickets.issue()
    await trio.sleep(1)
    tickets.issue()
    assert tickets.redeem(late.encode())
    last = tickets.issue()
    await trio.sleep(TICKET_S)
    assert not tickets.redeem(last.encode())


async def test_without_a_key_in_force_credentials_are_ignored(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        problem(await served.server.get(NONE, X_Volant_API_Key="whatever"), 404)
        problem(await served.server.get("/ws/v1/vms/none/logs?ticket=old&api_key=x", **UPGRADE), 404)
        assert (await served.server.ask(request("POST", "/api/v1/tickets"))).status == 201


async def test_other_settings_count_from_the_next_request_on(tmp_path: Path) -> None:
    access = Access(ApiSettings(api_keys=(OLD,)))
    holder = access.authenticate(
        scope("192.0.2.1") | {"headers": [(b"x-volant-api-key", OLD.encode())]}, in_query=False
    )
    once = access.tickets.issue(caller=holder)
    access.replace(ApiSettings(api_keys=(OLD,), allowed_hosts=("x",)))
    asked = scope("127.0.0.1") | {"query_string": f"ticket={once}".encode()}
    access.authenticate(asked, in_query=True)
    once = access.tickets.issue(caller=holder)
    access.replace(ApiSettings(api_keys=(KEY,)))
    with pytest.raises(Problem, match="ticket"):
        access.authenticate(scope("127.0.0.1") | {"query_string": f"ticket={once}".encode()}, in_query=True)
    for key, let_in in ((KEY, True), (OLD, False)):
        asked = scope("127.0.0.1") | {"headers": [(b"x-volant-api-key", key.encode())]}
        if let_in:
            access.authenticate(asked, in_query=False)
        else:
            with pytest.raises(Problem):
                access.authenticate(asked, in_query=False)


async def test_a_key_is_in_no_log_error_or_object(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = ApiSettings(api_keys=(KEY,))
    assert KEY not in repr(settings) + repr(vars(Access(settings).__class__)) + repr(Keys([KEY]).__dict__)
    async with api(tmp_path, settings) as served:
        logged = len(caplog.records)
        answers = [
            await served.server.get("/api/v1/vms", X_Volant_API_Key=KEY),
            await served.server.get(f"/api/v1/vms?api_key={KEY}"),
            await served.server.get(f"/api/v1/vms?api_key={KEY}", X_Volant_API_Key=KEY),
            await served.server.get(f"/ws/v1/vms/none/logs?api_key={KEY}", **UPGRADE),
            await served.server.get(f"/ws/v1/vms/none/logs?api_key={KEY}&tail={KEY[:-1]}", **UPGRADE),
            await served.server.get(f"/ws/v1/vms/none/logs?ticket={KEY}", **UPGRADE),
            await served.server.ask(request("GET", "/", X_Volant_API_Key=KEY) + b"\0"),
            # Lines that are no HTTP, which a parser likes to quote.
            await served.server.get("/", **{"X_Volant_API_Key": f"{KEY}\0"}),
            await served.server.get("/", **{"X Volant API Key": KEY}),
            await served.server.ask(f"GET /ws?api_key={KEY} \0 HTTP/1.1\r\n\r\n".encode()),
        ]
        assert len(caplog.records) > logged
        for answer in answers:
            assert KEY not in answer.body.decode() + str(answer.all_headers)
        assert [answer.status for answer in answers[-3:]] == [400, 400, 400]
    assert KEY not in caplog.text
    assert "401 from 127.0.0.1" in caplog.text


def test_no_credential_of_ours_reaches_a_guest() -> None:
    sent = to_guest(
        [
            (b"x-volant-api-key", KEY.encode()),
            (b"authorization", f"Bearer {KEY}".encode()),
            (b"cookie", KEY.encode()),
            (b"referer", f"http://localhost/page?a=1&api%5fkey={KEY}".encode()),
            (b"accept", b"*/*"),
        ],
        host=b"agent",
    )
    assert sent == [(b"host", b"agent"), (b"accept", b"*/*")]
    assert (b"referer", b"http://x/?a=1") in to_guest([(b"referer", b"http://x/?a=1")], host=b"agent")


# Unix sockets


async def test_a_unix_socket_needs_neither_address_nor_key_but_a_host_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    settings = ApiSettings(
        api_keys=(KEY,), allow_cidr=networks("10.0.0.0/8"), cors_origins=("https://console.example",)
    )
    async with api(tmp_path, settings) as served, trio.open_nursery() as nursery:
        problem(await served.server.get("/api/v1/vms"), 403)
        stopping = trio.Event()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            app = create_app(served.deps, FAST)

            async def run(task_status: trio.TaskStatus[None]) -> None:
                await serve(app, [listener], stopping=stopping, limits=FAST, task_status=task_status)

            await nursery.start(run)
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False) as client:
                assert (await client.get("/api/v1/vms")).status_code == 200
                assert (await client.post("/api/v1/tickets")).status_code == 201
                assert (await client.get("/api/v1/vms", headers={"host": "attacker.example"})).status_code == 421
                foreign = {"origin": "https://attacker.example"}
                assert (await client.post("/api/v1/tickets", headers=foreign)).status_code == 403
            stopping.set()


def test_the_name_unix_alone_does_not_skip_the_key() -> None:
    access = Access(ApiSettings(api_keys=(KEY,)))
    with pytest.raises(Problem):
        access.authenticate(scope("", unix=True) | {"state": {}}, in_query=False)


# Pages of other origins

CONSOLE = "https://console.example"
PREFLIGHT = {
    "Access_Control_Request_Method": "POST",
    "Access_Control_Request_Headers": "authorization,content-type,x-own",
}


@pytest.fixture
async def console(tmp_path: Path) -> Any:
    async with api(tmp_path, ApiSettings(api_keys=(KEY,), cors_origins=(CONSOLE,))) as served:
        yield served


async def test_a_page_of_an_allowed_origin_can_read_answers_and_errors(console: Api) -> None:
    for path, headers, status in (
        ("/api/v1/vms", {"X_Volant_API_Key": KEY}, 200),
        ("/api/v1/vms", {}, 401),
        (NONE, {"X_Volant_API_Key": KEY}, 404),
        (f"{NONE}/agent/x", {"X_Volant_API_Key": KEY}, 404),
        ("/healthz", {}, 200),
    ):
        answer = await console.server.get(path, Origin=CONSOLE, **headers)
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == CONSOLE
        assert answer.headers["access-control-expose-headers"] == "*"
        assert "access-control-allow-credentials" not in answer.headers
        assert answer.headers["vary"] == "Origin"
    async with streamed(console.server, f"/api/v1/events/vms?api_key={KEY}", Origin=CONSOLE) as body:
        assert body.headers["access-control-allow-origin"] == CONSOLE


async def test_other_origins_get_no_cors_headers(console: Api) -> None:
    own = f"http://127.0.0.1:{console.server.port}"
    for origin in ("https://attacker.example", "null", f"{CONSOLE}.attacker.example", "http://console.example", own):
        answer = await console.server.get("/healthz", Origin=origin)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert answer.headers["vary"] == "Origin"
        answer = await console.server.ask(request("OPTIONS", "/api/v1/vms", Origin=origin, **PREFLIGHT))
        assert answer.status == 401
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert (await console.server.get("/healthz")).headers["vary"] == "Origin"
    assert (await console.client.get("/")).headers["vary"] == "Accept-Encoding, Origin"


async def test_a_preflight_of_an_allowed_origin_needs_no_key(console: Api) -> None:
    for path in ("/api/v1/vms", f"{NONE}/agent/x", "/nothing"):
        async with await console.server.connect() as stream:
            # A connection that can be used again: the answer has no body.
            for _ in range(2):
                await stream.send_all(request("OPTIONS", path, Origin=CONSOLE, **PREFLIGHT))
                data = b""
                with trio.fail_after(30):
                    while b"\r\n\r\n" not in data:
                        data += await stream.receive_some(65536)
                head = data.decode().lower()
                assert head.startswith("http/1.1 204 ")
                assert head.endswith("\r\n\r\n")
                assert f"access-control-allow-origin: {CONSOLE}\r\n" in head
                assert "access-control-allow-headers: authorization,content-type,x-own\r\n" in head
                assert "delete" in head
                assert "transfer-encoding" not in head
    problem(await console.server.ask(request("OPTIONS", "/api/v1/vms", Origin=CONSOLE)), 401)
    refused = request("OPTIONS", "/api/v1/vms", **PREFLIGHT | {"Origin": CONSOLE, "Host": "attacker.example"})
    problem(await console.server.ask(refused), 421)


def test_a_guests_cors_headers_are_removed() -> None:
    said = from_guest([(b"access-control-allow-origin", b"*"), (b"content-type", b"text/plain")])
    assert [name for name, _ in said] == [b"content-type", b"cross-origin-resource-policy", b"content-security-policy"]


async def test_the_host_of_an_absolute_target_is_checked_instead_of_the_header(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        for target, host, status in (
            (f"http://127.0.0.1:{served.server.port}/api/v1/vms", "elsewhere.example", 200),
            ("http://elsewhere.example/api/v1/vms", "127.0.0.1", 421),
            ("http://user@127.0.0.1/api/v1/vms", "127.0.0.1", 421),
        ):
            assert (await served.server.get(target, Host=host)).status == status


async def test_a_connection_knows_whether_its_client_was_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    check = Access.check

    def spy(self: Access, scope: Any) -> None:
        seen.append(scope["state"]["standing"])
        check(self, scope)

    monkeypatch.setattr(Access, "check", spy)
    async with api(tmp_path, ApiSettings(api_keys=(KEY,))) as served:
        for path, headers, let_in in (
            ("/healthz", {}, False),
            (NONE, {}, False),
            (NONE, {"Host": "elsewhere"}, False),
            (NONE, {"X-Volant-API-Key": OLD}, False),
            (NONE, {"X-Volant-API-Key": KEY}, True),
        ):
            await served.server.get(path, **headers)
            assert seen[-1].let_in is let_in, (path, headers)
        # On one connection once is enough.
        served.client.headers["X-Volant-API-Key"] = KEY
        await served.client.get(NONE)
        del served.client.headers["X-Volant-API-Key"]
        assert (await served.client.get(NONE)).status_code == 401
        assert seen[-1] is seen[-2]
        assert seen[-1].let_in is True
    async with api(tmp_path) as served:
        await served.server.get(NONE)
        assert seen[-1].let_in is True
