"""The fleet on one machine leaves nothing behind, wherever its start was interrupted. The tutorial uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from examples.fleet.lab import Lab
from tests.attackers.local_user import PYTHON, needs_root
from tests.fleet.cluster import needs_etcd
from tests.processes import READS_ALL, killed_after

from .kit import ENVIRONMENT, ROOT

pytestmark = [needs_etcd, pytest.mark.skipif(os.getuid() != 0, reason="makes network namespaces as root")]
_S = 120.0


@pytest.fixture
def directory() -> Iterator[Path]:
    # Short: a socket path has at most 108 bytes.
    made = Path(mkdtemp(prefix="vl", dir="/tmp"))
    try:
        yield made
    finally:
        call(made, "down")


def call(directory: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**ENVIRONMENT, "FLEET_DIRECTORY": str(directory)}
    script = ROOT / "examples/fleet" / command
    return subprocess.run([script, *arguments], env=environ, capture_output=True, text=True, timeout=_S, check=False)


def left_of(directory: Path) -> list[str]:
    """Returns what is left of a fleet: its directory, its bridge and namespaces, its processes."""
    lab = Lab(directory, directory)
    found = [str(path) for path in (directory, Path("/sys/class/net", lab.bridge.name)) if path.exists()]
    return [*found, *map(str, lab.bridge.namespaces()), *(f"process {pid}" for pid in lab.processes())]


def test_a_fleet_starts_once_and_leaves_nothing(directory: Path, image_cache: Path) -> None:
    started = call(directory, "up", "--hosts", "2")
    assert started.returncode == 0, started.stderr
    found = json.loads(started.stdout)
    assert [host.keys() for host in found["hosts"]] == [{"name", "api", "pid"}] * 2
    for host in found["hosts"]:
        command = Path(f"/proc/{host['pid']}/cmdline").read_text().split("\0")
        assert "volant.daemon.main" in command
        assert host["name"] in command
    again = call(directory, "up")
    assert (again.returncode, again.stdout) == (1, "")
    assert "there is a fleet in" in again.stderr
    assert "examples/fleet/down removes it" in again.stderr
    # One that is dead and one that is frozen, which can't clean up.
    os.kill(found["hosts"][0]["pid"], 9)
    os.kill(found["hosts"][1]["pid"], 19)
    ended = call(directory, "down")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert not left_of(directory)
    assert call(directory, "down").returncode == 0


@pytest.mark.parametrize("file", ["pki/h2.pem", "h1/log"])
def test_what_a_killed_start_has_made_is_removed(directory: Path, image_cache: Path, file: str) -> None:
    process = subprocess.Popen(
        [ROOT / "examples/fleet/up", "--hosts", "2"],
        env={**ENVIRONMENT, "FLEET_DIRECTORY": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with killed_after(_S, process):
        while process.poll() is None and not (directory / file).exists():
            time.sleep(0.01)
    process.kill()
    assert process.communicate()[0] == b""
    assert call(directory, "down").returncode == 0
    assert not left_of(directory)


def test_down_removes_no_directory_of_others(tmp_path: Path) -> None:
    (tmp_path / "h1").mkdir()
    (tmp_path / "thesis").touch()
    done = call(tmp_path, "down")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path} is not the directory of a fleet: it has 'thesis'\n"
    assert (tmp_path / "thesis").exists()


@needs_root
@pytest.mark.skipif(Path(sys.executable).resolve() != Path(PYTHON), reason="other users can't run this Python")
def test_others_than_root_hear_what_it_needs(tmp_path: Path) -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", *READS_ALL, "python3", "-m", "examples.fleet", "up"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: only root can make network namespaces; run it with sudo\n"
