"""`volar login` polls as RFC 8628 asks for, says why it ends, and sends tokens to nobody else."""

from __future__ import annotations

import base64
import json
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from typing import Any

import click
import pytest

from tests.cli.kit import volar
from tests.client.kit import Server, answer, problem, serving, vm
from volant.cli import _remotes, _sign_in, _tokens, _user_files
from volant.cli._remotes import Remote, Remotes
from volant.cli._run import UNREACHABLE, Failure
from volant.cli._sign_in import DeviceCode, IssuerClient
from volant.cli._tokens import Login
from volant.model import SignIn


class Issuer:
    """Answers requests for tokens with what a test has queued."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self.forms: list[str] = []
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None: ...

            def do_GET(self) -> None:
                self._send(200, issuer.discovery)

            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if self.path == "/device":
                    self._send(200, issuer.code)
                    return
                issuer.forms.append(form)
                self._send(*issuer.answers.pop(0))

            def _send(self, status: int, value: object) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.sign_in = SignIn(self.url, "volar", "openid")
        self.code = {
            "device_code": "d", "user_code": "ABCD", "verification_uri": f"{self.url}/enter", "expires_in": 100,
        }  # fmt: skip
        self.discovery: dict[str, Any] = {
            "issuer": self.url,
            "token_endpoint": f"{self.url}/token",
            "device_authorization_endpoint": f"{self.url}/device",
        }

    def say(self, *errors: str) -> None:
        self.answers += [(400, {"error": error}) for error in errors]


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    thread = threading.Thread(target=issuer.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield issuer
    finally:
        issuer.server.shutdown()
        thread.join()
        issuer.server.server_close()


class Time:
    """The time of the polls, in which nobody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(_sign_in, "time", time)
    return time


def sign_in(issuer: Issuer) -> _sign_in.Granted:
    shown: list[DeviceCode] = []
    with IssuerClient(issuer.sign_in) as client:
        granted = client.sign_in(shown.append)
    assert [code.user_code for code in shown] == ["ABCD"]
    return granted


def test_it_polls_at_the_issuers_pace(issuer: Issuer, time: Time) -> None:
    issuer.say("authorization_pending", "slow_down", "authorization_pending")
    issuer.answers.append((200, {"id_token": "i", "refresh_token": "r", "token_type": "Bearer"}))
    granted = sign_in(issuer)
    assert (granted.id_token, granted.refresh_token) == ("i", "r")
    assert time.slept == [5, 5, 10, 10]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("access_denied", "the sign-in was denied"),
        ("expired_token", "no user signed in before the code expired"),
        ("invalid_client", "the issuer refuses the sign-in: invalid_client"),
    ],
)
def test_it_says_why_it_ends(issuer: Issuer, time: Time, error: str, words: str) -> None:
    issuer.say(error)
    with pytest.raises(Failure, match=words):
        sign_in(issuer)


def test_it_ends_when_the_code_does(issuer: Issuer, time: Time) -> None:
    issuer.say(*["authorization_pending"] * 100)
    with pytest.raises(Failure, match="no user signed in"):
        sign_in(issuer)
    assert time.now <= 100


@pytest.mark.parametrize(
    ("discovery", "words"),
    [
        ({"issuer": "https://other.example"}, "belongs to another issuer"),
        ({"token_endpoint": "http://other.example/token"}, "is not an https:// address"),
        ({"device_authorization_endpoint": None}, "has no sign-in by device code"),
    ],
)
def test_nothing_is_sent_where_others_could_read_it(
    issuer: Issuer, time: Time, discovery: dict[str, Any], words: str
) -> None:
    issuer.discovery |= discovery
    with pytest.raises(Failure, match=words), IssuerClient(issuer.sign_in) as client:
        client.sign_in(lambda code: None)
    assert issuer.forms == []


def token(expires: int) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps({'exp': expires}).encode()).decode().rstrip('=')}.x"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_an_expired_token_is_replaced_for_its_daemon_alone(issuer: Issuer, home: Path) -> None:
    lasting = token(2**40)
    _tokens.save("https://one.example", Login(issuer.sign_in, token(1), "r1"))
    _tokens.save("https://two.example", Login(issuer.sign_in, lasting, "r2"))
    issuer.answers.append((200, {"id_token": lasting, "refresh_token": "r3"}))
    assert _tokens.token_for("https://one.example") == lasting
    assert "refresh_token=r1" in issuer.forms[0]
    assert _tokens.load()["https://one.example"].refresh_token == "r3"
    assert _tokens.load()["https://two.example"].refresh_token == "r2"
    assert _tokens.token_for("https://three.example") is None
    assert [path.stat().st_mode & 0o777 for path in (home / "volant").iterdir()] == [0o600, 0o600]


def daemon_of(server: Server, issuer: Issuer) -> None:
    """Routes of a daemon that accepts the issuer's tokens. The issuer's codes can be polled each second."""
    issuer.code["interval"] = 1
    sign_in = {"issuer": issuer.sign_in.issuer, "client_id": "volar", "scopes": "openid"}
    server.routes["GET /api/v1/auth"] = answer({"required": True, "sign_in": sign_in, "browser_sign_in": False})
    server.routes["GET /api/v1/projects"] = answer([])
    server.routes["GET /api/v1/vms"] = answer([vm()])


async def test_commands_send_the_token_from_login_to_logout(issuer: Issuer, tmp_path: Path) -> None:
    environ, file, lasting = {"XDG_CONFIG_HOME": str(tmp_path)}, tmp_path / "volant/tokens.json", token(2**40)
    issuer.answers.append((200, {"id_token": lasting, "refresh_token": "r"}))
    async with serving() as server:
        daemon_of(server, issuer)
        signed_in = await volar(server, "login", environ=environ)
        assert (signed_in.code, signed_in.out.decode()) == (0, f"signed in to {server.base_url}\n"), signed_in.err
        assert f"Open {issuer.url}/enter and enter the code ABCD" in signed_in.err
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert (await volar(server, "vms", "list", environ=environ)).code == 0
        signed_out = await volar(server, "logout", environ=environ)
        assert (signed_out.code, json.loads(file.read_bytes())) == (0, {}), signed_out.err
        assert (await volar(server, "vms", "list", environ=environ)).code == 0
        again = await volar(server, "logout", environ=environ)
        assert (again.code, "you are not signed in" in again.err) == (1, True), again.err
    sent = [request.headers.get("x-volant-api-key") for request in server.requests]
    # For the issuer, to check the role, and for the VMs before and after the logout.
    assert sent == [None, lasting, lasting, None]


@pytest.mark.parametrize(
    ("answered", "words"),
    [
        ((200, {"id_token": "i"}), "none of the rules gives a role"),
        ((200, {"access_token": "a"}), "the issuer sent no ID token"),
    ],
)
async def test_a_login_that_fails_says_why_and_keeps_no_token(
    issuer: Issuer, tmp_path: Path, answered: tuple[int, dict[str, Any]], words: str
) -> None:
    issuer.answers.append(answered)
    async with serving() as server:
        daemon_of(server, issuer)
        server.routes["GET /api/v1/projects"] = problem(403, "no-role", "none of the rules gives a role")
        done = await volar(server, "login", environ={"XDG_CONFIG_HOME": str(tmp_path)})
    assert (done.code, words in done.err) == (1, True), done.err
    assert not (tmp_path / "volant/tokens.json").exists()


def test_a_sign_in_that_has_ended_says_what_to_do(issuer: Issuer, home: Path) -> None:
    _tokens.save("https://one.example", Login(issuer.sign_in, token(1), "r1"))
    issuer.say("invalid_grant")
    with pytest.raises(click.ClickException, match=r"run `volar login` \(invalid_grant\)"):
        _tokens.token_for("https://one.example")
    _tokens.save("https://one.example", Login(issuer.sign_in, "garbage"))
    with pytest.raises(click.ClickException, match="run `volar login`"):
        _tokens.token_for("https://one.example")


def test_a_damaged_file_is_named(home: Path) -> None:
    (home / "volant").mkdir()
    (home / "volant/tokens.json").write_text("[]")
    with pytest.raises(click.UsageError, match=r"tokens\.json is damaged"):
        _tokens.token_for("https://one.example")


def test_a_lock_that_is_not_released_has_a_deadline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_user_files, "LOCK_S", 0.1)
    login = Login(SignIn("https://issuer.example", "volar", "openid"), token(2**40))
    with (
        _user_files.locked(home / "volant/tokens.json"),
        pytest.raises(click.ClickException, match=r"another process has locked .*/tokens\.lock for 0\.1 s"),
    ):
        _tokens.save("https://one.example", login)
    _tokens.save("https://one.example", login)


def test_changes_of_remotes_exclude_each_other(home: Path) -> None:
    def add(name: str) -> None:
        def edit(known: Remotes) -> Remotes:
            sleep(0.01)
            return Remotes({**known.remotes, name: Remote(f"https://{name}.example")})

        _remotes.change(edit)

    names = [f"remote-{number}" for number in range(8)]
    threads = [threading.Thread(target=add, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(_remotes.load().remotes) == names
    assert {path.name for path in (home / "volant").iterdir()} == {"remotes.json", "remotes.lock"}


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
def test_an_issuer_that_answers_byte_by_byte_has_a_deadline(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sign_in, "_REQUEST_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def drip() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(said)
                    # Whoever waits for as long as something comes gets a whole answer at last.
                    for _ in range(1000):
                        connection.sendall(b"X-A: b\r\n" if b"Content-Length" not in said else b" ")
                        sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(Failure, match=r"can't be reached|does not answer within 0\.3 s") as failure:
                with IssuerClient(SignIn(url, "volar", "openid")) as client:
                    client.refresh("r")
        finally:
            thread.join()
    assert failure.value.code == UNREACHABLE
