"""`volar remote`: daemons by name, each trusted by its fingerprint or its authority."""

from __future__ import annotations

import json
import os
import pty
import select
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.cli.kit import ENVIRONMENT, ROOT, command
from tests.system.kit import Daemon

pytestmark = pytest.mark.programs

KEY = "key-0123456789abcdef"
WITHIN_S = 60


class World:
    """A daemon with TLS and a key, and a user with a home of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home = path / "home"
        self.home.mkdir()
        self.file = self.home / ".config/volant/remotes.json"
        self.key_file = path / "key"
        self.key_file.write_text(KEY)
        self.authority = Authority(path)
        self.clients = Authority(path, "clients")

    def run(self, *words: str, code: int = 0, **environ: str) -> str:
        """Runs `volar`; returns what it prints."""
        done = subprocess.run(
            command(*words), env=self.environ(**environ), cwd=ROOT, capture_output=True, text=True,
            timeout=WITHIN_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def environ(self, **environ: str) -> dict[str, str]:
        kept = {name: value for name, value in ENVIRONMENT.items() if name != "XDG_CONFIG_HOME"}
        return kept | {"HOME": str(self.home), **environ}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def daemon(world: World) -> Iterator[Daemon]:
    daemon = Daemon(world.path / "cache", "--tls-self-signed", environ={"VOLANT_API_KEY": KEY})
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.dispose()


def test_a_script_has_to_pass_the_fingerprint(world: World, daemon: Daemon) -> None:
    url = daemon.base_url
    key = ("--api-key-file", str(world.key_file))
    said = world.run("remote", "add", "prod", url, *key, code=1)
    fingerprint = said.split("--fingerprint ")[1].split()[0]
    assert len(fingerprint) == 64
    wrong = "0" * 64
    assert fingerprint in world.run("remote", "add", "prod", url, "--fingerprint", wrong, *key, code=5)
    assert not world.file.exists()
    assert "API key" in world.run("remote", "add", "prod", url, "--fingerprint", fingerprint, code=1)
    spelled = ":".join(fingerprint[i : i + 2] for i in range(0, 64, 2)).upper()
    world.run("remote", "add", "prod", url, "--fingerprint", spelled, *key)
    assert stat.S_IMODE(world.file.stat().st_mode) == 0o600
    assert KEY not in world.file.read_text()

    # Requests, streams and WebSockets.
    assert json.loads(world.run("--remote", "prod", "vms", "list", "--json")) == []
    assert json.loads(world.run("vms", "list", "--json", VOLANT_REMOTE="prod")) == []
    world.run("logs", "none", code=3, VOLANT_REMOTE="prod")
    world.run("vms", "console", "none", code=3, VOLANT_REMOTE="prod")
    world.run("vms", "list", code=5)
    world.run("remote", "use", "prod")
    assert json.loads(world.run("vms", "list", "--json")) == []
    assert "prod" in world.run("remote", "list")
    assert json.loads(world.run("remote", "get", "prod", "--json"))["fingerprint"] == fingerprint
    world.run("remote", "add", "prod", url, "--fingerprint", fingerprint, *key, code=4)
    world.run("remote", "use", "local")
    world.run("vms", "list", code=5)
    world.run("remote", "delete", "prod")
    assert "no remote 'prod'" in world.run("--remote", "prod", "vms", "list", code=2)


def test_a_pinned_daemon_with_another_certificate_is_refused(world: World, daemon: Daemon) -> None:
    other = {"prod": {"address": daemon.base_url, "fingerprint": "0" * 64, "api_key_file": str(world.key_file)}}
    world.file.parent.mkdir(parents=True)
    world.file.write_text(json.dumps({"remotes": other}))
    for words in (("vms", "list"), ("logs", "none"), ("vms", "console", "none"), ("events",)):
        assert "has the fingerprint" in world.run("--remote", "prod", *words, code=5)


def test_a_person_is_asked(world: World, daemon: Daemon) -> None:
    for answer, code in ((b"\n", 1), (b"y\n", 0)):
        master, slave = pty.openpty()
        process = subprocess.Popen(
            command("remote", "add", "prod", daemon.base_url, "--api-key-file", str(world.key_file)),
            env=world.environ(), cwd=ROOT, stdin=slave, stdout=slave, stderr=slave,
        )  # fmt: skip
        os.close(slave)
        said = b""
        deadline = time.monotonic() + WITHIN_S
        try:
            while b"[y/N]" not in said:
                readable, _, _ = select.select([master], [], [], max(0, deadline - time.monotonic()))
                assert readable, said
                said += os.read(master, 4096)
            os.write(master, answer)
            assert process.wait(WITHIN_S) == code, said
        finally:
            process.kill()
            process.wait()
            os.close(master)
        assert b"SHA-256 fingerprint: " in said
        assert world.file.exists() == (code == 0)
    assert json.loads(world.run("--remote", "prod", "vms", "list", "--json")) == []


def test_an_authority_and_a_client_certificate(world: World) -> None:
    daemon = Daemon(
        world.path / "cache",
        *("--tls-cert", str(world.authority.issue("localhost"))),
        *("--client-ca", str(world.clients.path), "--tls-subjects", "CN=boss:admin"),
    )
    daemon.start()
    try:
        boss = world.clients.issue("boss", client=True)
        known, shown = ("--ca-file", str(world.authority.path)), ("--client-cert", str(boss))
        assert json.loads(world.run("--api", daemon.base_url, *known, *shown, "vms", "list", "--json")) == []
        environ: dict[str, Any] = {"VOLANT_CA_FILE": known[1], "VOLANT_CLIENT_CERT": shown[1]}
        environ["VOLANT_API_BASE"] = daemon.base_url
        assert json.loads(world.run("vms", "list", "--json", **environ)) == []
        for words in (("vms", "list"), ("events",)):
            assert "not trusted" in world.run("--api", daemon.base_url, *words, code=5)
            assert "--client-cert" in world.run("--api", daemon.base_url, *known, *words, code=5)
        world.run("remote", "add", "prod", daemon.base_url, *known, *shown)
        world.run("--remote", "prod", "vms", "list")
    finally:
        daemon.dispose()


def test_contradictions_are_wrong_usage(world: World) -> None:
    world.run("--remote", "a", "--api", "http://localhost:1", "vms", "list", code=2)
    world.run("vms", "list", code=2, VOLANT_REMOTE="a", VOLANT_API_BASE="http://localhost:1")
    world.run("--ca-file", str(world.path / "none"), "--api", "https://localhost:1", "vms", "list", code=2)
    world.run("remote", "add", "local", "https://localhost:1", code=2)
    world.run("remote", "add", "prod", "http://localhost:1", "--fingerprint", "0" * 64, code=2)
    world.run("remote", "add", "prod", "https://localhost:1", "--fingerprint", "0", code=2)
    world.run("remote", "add", "prod", "https://localhost:1", code=5)
    world.file.parent.mkdir(parents=True)
    world.file.write_text("{")
    assert "is damaged" in world.run("vms", "list", code=2)


def test_http_on_a_port_of_https_is_explained(world: World, daemon: Daemon) -> None:
    said = world.run("--api", daemon.base_url.replace("https", "http"), "vms", "list", code=1)
    assert "expects TLS" in said
