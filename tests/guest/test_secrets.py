"""The values of secrets in the guest: files in memory and nowhere else, and variables of programs."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import Asker
from tests.guest.test_workload import printed_by
from volant.model import agent as wire

VALUE = "correct horse battery staple"
MANIFEST = {"name": "web", "exec": {"env": {"PLAIN": "p", "TOKEN": "the manifest's"}}}


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory on a tmpfs."""
    with tempfile.TemporaryDirectory(prefix="volant-test-", dir="/dev/shm") as made:
        yield Path(made)


def encoded(value: str | bytes) -> str:
    return base64.b64encode(value.encode() if isinstance(value, str) else value).decode()


def put(
    agent: Asker, boot: str = "vm.1", env: dict[str, str] | None = None, files: dict[str, str] | None = None
) -> Any:
    body = {
        "boot": boot,
        "env": {name: encoded(value) for name, value in (env or {}).items()},
        "files": [{"path": path, "data": encoded(value)} for path, value in (files or {}).items()],
    }
    answer = agent.ask("PUT", wire.DAEMON_SECRETS, body)
    assert answer.status == 200, answer.body
    return answer.json()


def printed(lines: list[Any]) -> str:
    return b"".join(base64.b64decode(line["data"]) for line in lines if "data" in line).decode()


def test_the_agent_says_for_which_boot_it_has_values(agent: Asker) -> None:
    assert agent.ask("GET", wire.DAEMON_SECRETS).json() == {"boot": None}
    assert put(agent, "vm.1", {"TOKEN": VALUE}) == {"boot": "vm.1"}
    answer = agent.ask("GET", wire.DAEMON_SECRETS)
    assert answer.json() == {"boot": "vm.1"}
    assert b"staple" not in answer.body
    for path in (wire.INFO, wire.HEALTHZ, wire.DAEMON_WORKLOAD):
        assert b"staple" not in agent.ask("GET", path).body


def test_a_file_is_readable_by_its_owner_alone_and_is_replaced_whole(agent: Asker, in_memory: Path) -> None:
    file = in_memory / "secrets" / "token"
    put(agent, files={str(file): VALUE})
    put(agent, "vm.2", files={str(file): "another"})
    assert (file.read_text(), file.stat().st_mode & 0o7777) == ("another", 0o400)
    assert [each.name for each in file.parent.iterdir()] == ["token"]


def test_names_do_not_collide_while_files_are_written(agent: Asker, in_memory: Path) -> None:
    names = ("token", ".token.new", ".token.new.new", "x" * 255)
    files = {str(in_memory / name): f"value of {name}" for name in names}
    put(agent, files=files)
    put(agent, "vm.2", files=files)
    assert {str(each): each.read_text() for each in in_memory.iterdir()} == files


def test_a_failure_leaves_no_file(agent: Asker, in_memory: Path) -> None:
    (in_memory / "token").mkdir()
    body = {"boot": "b", "files": [{"path": str(in_memory / "token"), "data": encoded(VALUE)}]}
    assert agent.ask("PUT", wire.DAEMON_SECRETS, body).status == 409
    assert [each.name for each in in_memory.iterdir()] == ["token"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_a_file_belongs_to_the_user_of_the_workload(agent: Asker, in_memory: Path) -> None:
    body = {"boot": "b", "files": [{"path": str(in_memory / "token"), "data": encoded(VALUE)}], "user": "65534:12"}
    assert agent.ask("PUT", wire.DAEMON_SECRETS, body).status == 200
    figures = (in_memory / "token").stat()
    assert (figures.st_uid, figures.st_gid, figures.st_mode & 0o777) == (65534, 12, 0o400)


def test_a_file_for_an_unknown_user_is_refused(agent: Asker, in_memory: Path) -> None:
    files = [{"path": str(in_memory / "token"), "data": encoded(VALUE)}]
    body = {"boot": "b", "files": files, "user": "nobody-knows-them"}
    answer = agent.ask("PUT", wire.DAEMON_SECRETS, body)
    assert (answer.status, b"the image has no user" in answer.body) == (409, True)
    assert list(in_memory.iterdir()) == []


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A directory that is not in memory, as /tmp is on some hosts: what is in /var/tmp survives a reboot."""
    with tempfile.TemporaryDirectory(prefix="volant-test-", dir="/var/tmp") as made:
        yield Path(made)


def test_no_file_gets_onto_a_disk(agent: Asker, in_memory: Path, on_disk: Path) -> None:
    (in_memory / "link").symlink_to(on_disk)
    for directory in (on_disk, in_memory / "link"):
        body = {
            "boot": "b",
            "env": {"T": encoded(VALUE)},
            "files": [{"path": f"{directory}/t", "data": encoded(VALUE)}],
        }
        answer = agent.ask("PUT", wire.DAEMON_SECRETS, body)
        assert (answer.status, b"on a disk" in answer.body, b"staple" in answer.body) == (409, True, False)
        assert encoded(VALUE).encode() not in answer.body
    assert list(on_disk.iterdir()) == []
    assert agent.ask("GET", wire.DAEMON_SECRETS).json() == {"boot": None}


def test_the_workload_and_its_check_have_the_variables_over_the_manifests(agent: Asker) -> None:
    put(agent, env={"TOKEN": VALUE})
    program = 'printf "%s|%s" "$TOKEN" "$PLAIN"'
    assert printed_by(agent, "/bin/sh", "-c", program, env={"TOKEN": "plain", "PLAIN": "p"}) == f"{VALUE}|p"


def test_the_same_workload_fits_after_the_values_have_changed(agent: Asker) -> None:
    put(agent, env={"TOKEN": VALUE})
    spec = {"entrypoint": ["/bin/sleep", "60"]}
    assert agent.ask("PUT", wire.DAEMON_WORKLOAD, spec).status == 200
    put(agent, "vm.2", env={"TOKEN": "another"})
    assert agent.ask("PUT", wire.DAEMON_WORKLOAD, spec).status == 200


@pytest.mark.parametrize("has_exec", [True, False])
def test_commands_have_the_variables_where_they_have_those_of_the_manifest(agent: Asker, has_exec: bool) -> None:
    manifest = MANIFEST if has_exec else {"name": "web"}
    assert agent.ask("PUT", wire.DAEMON_MANIFEST, manifest).status == 200
    put(agent, env={"TOKEN": VALUE})
    command = ("/bin/sh", "-c", 'printf %s "$TOKEN"')
    assert printed(agent.run(*command)) == (VALUE if has_exec else "")
    assert printed(agent.run(*command, env={"TOKEN": "the request's"})) == "the request's"


def test_the_file_with_the_manifest_has_no_value(agent: Asker) -> None:
    put(agent, env={"TOKEN": VALUE})
    assert agent.ask("PUT", wire.DAEMON_MANIFEST, MANIFEST).status == 200
    assert "staple" not in json.dumps(agent.server.plugin.info())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "boot"),
        ({"boot": ""}, "boot"),
        ({"boot": "b", "env": {"T": "no base64!"}}, "env"),
        ({"boot": "b", "env": {"A=B": ""}}, "env"),
        ({"boot": "b", "env": {"T": encoded(b"a\0b")}}, "env"),
        ({"boot": "b", "env": [1]}, "env"),
        ({"boot": "b", "files": [{"path": "t", "data": ""}]}, "files[0].path"),
        ({"boot": "b", "files": [{"path": "/run/t", "data": 1}]}, "files[0].data"),
        ({"boot": "b", "files": [{"path": "/run/t", "data": "", "mode": 0o777}]}, "files[0].mode"),
        ({"boot": "b", "user": 0}, "user"),
        ({"boot": "b", "more": 1}, "more"),
    ],
)
def test_a_malformed_request_is_refused(agent: Asker, body: object, field: str) -> None:
    answer = agent.ask("PUT", wire.DAEMON_SECRETS, body)
    assert (answer.status, answer.json().get("field")) == (400, field), answer.body
