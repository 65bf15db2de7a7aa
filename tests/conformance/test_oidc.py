"""Sign in at an issuer that this project did not write (oidc-provider), with `volar` and a real `volantd`."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chromium import needs_chromium
from tests.cli.kit import ENVIRONMENT, ROOT, command
from tests.conformance.kit import JS, Node
from tests.conformance.test_console import play
from tests.processes import killed_after, read_line
from tests.system.kit import Daemon

pytestmark = pytest.mark.programs

WITHIN_S = 60.0


class Issuer:
    """The issuer, as a process."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.start(0)

    def start(self, port: int) -> None:
        self.process = subprocess.Popen(
            self._node.command("oidc.mjs", str(port)), cwd=JS, env=dict(self._node.environ), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.url = str(self._answer()["issuer"])

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, **said: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(said) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def token(self, how: str = "key", header: dict[str, Any] | None = None, **changes: Any) -> str:
        now = int(time.time())
        claims = {"iss": self.url, "aud": "volar", "sub": "ops", "groups": ["ops"], "iat": now, "exp": now + 600}
        return str(self.send(sign=claims | changes, how=how, header=header or {})["token"])

    def _answer(self) -> dict[str, Any]:
        while not (line := read_line(self.process, WITHIN_S)).startswith("{"):
            pass
        found: dict[str, Any] = json.loads(line)
        return found


class World:
    """A daemon that accepts the issuer's tokens, and a user."""

    def __init__(self, path: Path, issuer: Issuer) -> None:
        self.issuer = issuer
        self.home = path / "home"
        self.home.mkdir()
        self.tokens = self.home / ".config/volant/tokens.json"
        self.daemon = Daemon(
            path / "cache",
            environ={
                "VOLANT_OIDC_ISSUER": issuer.url,
                "VOLANT_OIDC_AUDIENCE": "volar",
                "VOLANT_OIDC_CLIENT_ID": "volar",
                "VOLANT_OIDC_ROLES": "groups=ops:admin,groups=web:viewer:web",
            },
        )
        self.daemon.start()

    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in ENVIRONMENT.items() if name != "XDG_CONFIG_HOME"}
        return kept | {"HOME": str(self.home), "VOLANT_API_BASE": self.daemon.base_url}

    def run(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            command(*words), env=self.environ(), cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def login(self, user: str, *, denied: bool = False) -> tuple[int, str]:
        """Runs `volar login` and a person with a browser."""
        process = subprocess.Popen(
            command("login"), env=self.environ(), cwd=ROOT, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            said = ""
            with killed_after(WITHIN_S, process):
                while "Open " not in said:
                    line = process.stderr.readline()
                    assert line, f"volar has ended, or printed no address within {WITHIN_S:.0f} s: {said}"
                    said += line
            found = re.search(r"Open (\S+) and enter the code (\S+)", said)
            assert found is not None
            person(found[1], found[2], user, denied=denied)
            said += process.communicate(timeout=WITHIN_S)[1]
            return process.returncode, said
        finally:
            process.kill()
            process.wait()

    def status(self, token: str) -> tuple[int, str]:
        answer = httpx.get(
            f"{self.daemon.base_url}/api/v1/vms", headers={"Authorization": f"Bearer {token}"}, timeout=WITHIN_S
        )
        said = answer.json()
        return answer.status_code, "" if answer.is_success else str(said["type"]).rpartition("/")[2].rpartition(":")[2]


def person(url: str, code: str, user: str, *, denied: bool) -> None:
    """Enters a code, signs in and agrees, as the issuer's pages ask for it."""
    with httpx.Client(timeout=WITHIN_S, follow_redirects=True) as browser:
        page = browser.get(url)
        secret = re.search(r'name="xsrf" value="([^"]+)"', page.text)
        assert secret is not None, page.text
        form = {"xsrf": secret[1], "user_code": code}
        page = browser.post(url, data=form | {"confirm": "yes", **({"abort": "yes"} if denied else {})})
        if denied:
            return
        for fields in ({"prompt": "login", "login": user, "password": "x"}, {"prompt": "consent"}):
            action = re.search(r'action="([^"]+)"', page.text)
            assert action is not None, page.text
            page = browser.post(str(page.url.join(action[1])), data=fields)
        assert page.status_code == 200, page.text


@pytest.fixture
def world(tmp_path: Path, node: Node) -> Iterator[World]:
    issuer = Issuer(node)
    world = None
    try:
        world = World(tmp_path, issuer)
        yield world
    finally:
        issuer.stop()
        if world is not None:
            world.daemon.dispose()


@pytest.mark.full
def test_a_person_signs_in_by_device_code_and_stays_signed_in(world: World) -> None:
    assert "requires an API key" in world.run("vms", "list", code=1)
    world.issuer.send(ttl=31)
    code, said = world.login("ops")
    assert code == 0, said
    assert stat.S_IMODE(world.tokens.stat().st_mode) == 0o600
    first = world.tokens.read_text()
    # It has half a minute and a second, and volar replaces those with less than half a minute.
    deadline = time.monotonic() + WITHIN_S
    while world.tokens.read_text() == first and time.monotonic() < deadline:
        world.run("vms", "list")
        world.run("keys", "list")
    assert world.tokens.read_text() != first
    world.run("logout")
    assert "requires an API key" in world.run("vms", "list", code=1)


@pytest.mark.full
def test_a_person_without_a_role_or_who_denies_is_told_so(world: World) -> None:
    code, said = world.login("nobody")
    assert (code, "none of this daemon's rules gives it a role" in said) == (1, True), said
    code, said = world.login("ops", denied=True)
    assert (code, "was denied" in said) == (1, True), said
    assert not world.tokens.exists()


@needs_chromium
def test_a_person_signs_in_to_the_console(world: World, node: Node) -> None:
    # Another site than the issuer's, 127.0.0.1.
    console = world.daemon.base_url.replace("127.0.0.1", "localhost")
    assert play(node, "issuer", console, {}, world.issuer.url) == [
        {
            "at": "/#/vms", "role": 1, "cookies": [["volant-session", True, "Strict"]],
            "left": [0, ["volant-session"]],
        },
        {"unfinished": 0},
        {"stayed": ["/", 0, 0]},
    ]  # fmt: skip


def test_only_the_issuers_tokens_for_us_are_callers(world: World) -> None:
    issuer, now = world.issuer, int(time.time())
    assert world.status(issuer.token()) == (200, "")
    for token in (
        issuer.token(aud="another"),
        issuer.token(iss="http://127.0.0.1:1"),
        issuer.token("none"),
        issuer.token("hmac"),
        issuer.token(header={"kid": "unknown"}),
        issuer.token(nbf=now + 600),
    ):
        assert world.status(token) == (401, "invalid-token")
    assert world.status(issuer.token(exp=now - 61)) == (401, "token-expired")
    assert world.status(issuer.token(groups=[])) == (403, "no-role")


@pytest.mark.full
def test_keys_are_rotated_and_outlive_the_issuer(world: World) -> None:
    issuer = world.issuer
    old = issuer.token()
    assert world.status(old)[0] == 200
    issuer.send(rotate="second")
    new = issuer.token()
    deadline = time.monotonic() + WITHIN_S
    while world.status(new)[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert world.status(old) == (401, "invalid-token")
    kept = issuer.token(sub="again")
    issuer.stop()
    assert world.status(kept)[0] == 200
    assert world.status(new)[0] == 200


@pytest.mark.full
def test_a_stream_ends_with_its_token(world: World) -> None:
    # Clocks may differ by a minute, so it is valid for some more seconds.
    token = world.issuer.token(exp=int(time.time()) - 45)
    deadline = time.monotonic() + WITHIN_S
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.stream("GET", f"{world.daemon.base_url}/api/v1/events/vms", headers=headers, timeout=WITHIN_S) as stream:
        assert stream.status_code == 200
        for _ in stream.iter_raw():
            assert time.monotonic() < deadline
    assert world.status(token) == (401, "token-expired")
