"""The manifest of a VM's plugin: the agent reports it, and programs in the guest find it."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from tests.guest.conftest import Asker
from tests.guest.test_workload import put, wait_for
from volant.model import agent as wire

MANIFEST = {
    "name": "web",
    "version": "1.2",
    "labels": {"team": "a"},
    "actions": {"shot": {"path": "/shot"}, "find": {"path": "/find"}},
    "workload": {"entrypoint": ["x"], "port": 80},
}


def test_info_has_the_plugin(agent: Asker) -> None:
    assert "plugin" not in agent.ask("GET", wire.INFO).json()
    assert agent.ask("PUT", wire.DAEMON_MANIFEST, MANIFEST).status == 200
    assert agent.ask("GET", wire.INFO).json()["plugin"] == {
        "name": "web",
        "version": "1.2",
        "labels": {"team": "a"},
        "actions": ["find", "shot"],
    }


def test_the_workload_finds_the_manifest(agent: Asker, manifest_file: Path, tmp_path: Path) -> None:
    agent.ask("PUT", wire.DAEMON_MANIFEST, MANIFEST)
    assert not manifest_file.exists(), "the guest may not be set up"
    put(agent, "sh", "-c", f'cat "$VOLANT_MANIFEST" > {tmp_path}/seen', restart="never")
    wait_for(agent, lambda status: status["state"] == "exited")
    assert json.loads((tmp_path / "seen").read_text()) == MANIFEST
    assert manifest_file.stat().st_mode & 0o777 == 0o444


def test_the_vms_environment_wins(agent: Asker, tmp_path: Path) -> None:
    agent.ask("PUT", wire.DAEMON_MANIFEST, MANIFEST)
    put(agent, "sh", "-c", f'echo "$VOLANT_MANIFEST" > {tmp_path}/seen', restart="never", env={"VOLANT_MANIFEST": "x"})
    wait_for(agent, lambda status: status["state"] == "exited")
    assert (tmp_path / "seen").read_text() == "x\n"


def said(lines: list[dict[str, object]]) -> str:
    return b"".join(base64.b64decode(str(line["data"])) for line in lines if "data" in line).decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs as another user")
def test_commands_start_as_the_manifest_says_unless_the_request_does(agent: Asker, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    workdir = tmp_path / "srv"
    defaults = {"env": {"A": "1", "B": "2"}, "user": "nobody", "workdir": str(workdir)}
    assert agent.ask("PUT", wire.DAEMON_MANIFEST, {**MANIFEST, "exec": defaults}).status == 200
    show = ("/bin/sh", "-c", 'echo "$A $B $(id -u) $HOME $(pwd)" > /dev/stdout')
    assert said(agent.run(*show)) == f"1 2 65534 /nonexistent {workdir}\n"
    assert workdir.is_dir()
    own = {"env": {"B": "3", "HOME": "/x"}, "user": "0", "cwd": "/usr"}
    assert said(agent.run(*show, **own)) == "1 3 0 /x /usr\n"
    lines = agent.run(*show, cwd=str(tmp_path / "none"))
    assert lines[-1]["code"] == "no_such_directory", "only the manifest's directory is made"


@pytest.mark.parametrize("defaults", [{"env": {"": "x"}}, {"user": ""}, {"workdir": "srv"}])
def test_malformed_defaults_of_commands_are_refused(agent: Asker, defaults: dict[str, object]) -> None:
    answer = agent.ask("PUT", wire.DAEMON_MANIFEST, {**MANIFEST, "exec": defaults})
    assert (answer.status, answer.json()["field"]) == (400, f"exec.{next(iter(defaults))}")


def test_commands_find_the_manifest(agent: Asker, manifest_file: Path) -> None:
    agent.ask("PUT", wire.DAEMON_MANIFEST, MANIFEST)
    agent.run("cat", str(manifest_file))
    assert json.loads(manifest_file.read_text()) == MANIFEST


def test_a_new_daemon_may_send_the_manifest_again(agent: Asker, manifest_file: Path) -> None:
    for version in ("1", "2"):
        agent.ask("PUT", wire.DAEMON_MANIFEST, {**MANIFEST, "version": version})
        agent.run("true")
        assert json.loads(manifest_file.read_text())["version"] == version


def test_without_a_manifest_there_is_neither_file_nor_variable(
    agent: Asker, manifest_file: Path, tmp_path: Path
) -> None:
    put(agent, "sh", "-c", f'echo "${{VOLANT_MANIFEST-unset}}" > {tmp_path}/seen', restart="never")
    wait_for(agent, lambda status: status["state"] == "exited")
    assert (tmp_path / "seen").read_text() == "unset\n"
    assert not manifest_file.exists()


def test_an_unwritable_manifest_file_does_not_stop_the_workload(
    agent: Asker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wire, "MANIFEST_FILE", "/nonexistent/manifest.json")
    agent.ask("PUT", wire.DAEMON_MANIFEST, MANIFEST)
    put(agent, "sleep", "1000")
    wait_for(agent, lambda status: status["state"] == "healthy")
    assert "the manifest can't be written" in capfd.readouterr().err


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"name": 3}', b"\xff", b"[" * 100_000])
def test_a_malformed_manifest_is_refused(agent: Asker, body: bytes) -> None:
    assert agent.ask("PUT", wire.DAEMON_MANIFEST, body).status == 400
    assert "plugin" not in agent.ask("GET", wire.INFO).json()
