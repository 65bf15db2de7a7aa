"""Programs run in the root filesystem, while the agent stays in the initramfs."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from volant.guest import _root
from volant.guest._http import Problem
from volant.guest._root import NoSuchUser, account, identity, inside, root, state

from .conftest import Asker, needs_chroot


def test_without_a_root_filesystem_calls_use_the_initramfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_root, "_known", None)
    monkeypatch.setattr(_root, "kernel_parameters", lambda: ["quiet"])
    assert (state(), root()) == (("none", ""), "/")
    assert inside(threading.get_ident) == threading.get_ident()


def test_nothing_runs_before_the_root_is_mounted(told: Path, agent: Asker) -> None:
    for method, path, body in (
        ("POST", "/v1/exec", {"command": ["true"]}),
        ("PUT", "/v1/daemon/workload", {"entrypoint": ["true"]}),
    ):
        answer = agent.ask(method, path, body)
        assert (answer.status, answer.json()["detail"]) == (503, "the root filesystem is not mounted yet")
    assert agent.ask("GET", "/v1/daemon/root").json() == {"state": "pending", "detail": ""}
    assert agent.server.workload.status()["state"] == "none"
    told.write_text("failed: no ext4: none at all\n")
    assert agent.ask("GET", "/v1/daemon/root").json() == {"state": "failed", "detail": "no ext4: none at all"}
    assert agent.ask("POST", "/v1/exec", {"command": ["true"]}).status == 503
    with pytest.raises(Problem, match="no ext4: none at all"):
        inside(lambda: None)


@needs_chroot
def test_only_the_call_sees_the_root_filesystem(mounted: Path) -> None:
    (mounted / "etc/name").write_text("inside")
    (mounted / "out").symlink_to("/etc/name")
    assert inside(lambda: Path("/out").read_text()) == "inside"
    assert inside(os.getcwd) == "/"
    assert {path.name for path in inside(lambda: list(Path("/..").iterdir()))} == {"etc", "out"}
    assert Path("/proc/self/root").samefile("/")
    assert not Path("/out").exists()
    with pytest.raises(FileNotFoundError):
        inside(lambda: os.open("/none", os.O_RDONLY))


@needs_chroot
def test_programs_are_searched_in_the_root_filesystem_only(mounted: Path) -> None:
    with pytest.raises(FileNotFoundError):
        inside(lambda: subprocess.Popen(["true"]))


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("web", (33, 34, [40, 41])),
        ("33", (33, 34, [40, 41])),
        ("7", (7, 0, [])),
        ("web:extra", (33, 40, [])),
        ("7:8", (7, 8, [])),
        ("web:8", (33, 8, [])),
        ("none", None),
        ("web:none", None),
        ("broken", None),
        ("4294967295", None),
        ("9" * 200, None),
        ("", None),
    ],
)
@needs_chroot
def test_users_come_from_the_root_filesystem(
    mounted: Path, user: str, expected: tuple[int, int, list[int]] | None
) -> None:
    (mounted / "etc/passwd").write_text("root:x:0:0::/:/\nweb:x:33:34:,,:/:/\nbroken:x:y:z\nshort:x\n\n")
    (mounted / "etc/group").write_text("www:x:34:\nextra:x:40:other,web\nmore:x:41:web\nshort\n")
    if expected is None:
        with pytest.raises(NoSuchUser):
            identity(user)
    else:
        found = identity(user)
        assert (found["user"], found["group"], found["extra_groups"]) == expected


@needs_chroot
def test_the_home_directory_is_that_of_the_user(mounted: Path) -> None:
    (mounted / "etc/passwd").write_text("web:x:33:34:,,:/srv/web:/\nbare:x:35:35\nodd:x:36:36::srv:/\n")
    homes = {user: account(user)[1] for user in ("web", "33", "bare", "odd", "1234")}
    assert homes == {"web": "/srv/web", "33": "/srv/web", "bare": "/", "odd": "/", "1234": "/"}


@needs_chroot
def test_without_tables_numeric_users_work(mounted: Path) -> None:
    assert identity("5")["user"] == 5
    with pytest.raises(NoSuchUser):
        identity("root")
