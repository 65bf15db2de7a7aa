"""`volantd` accepts options before and after a sub-command, and creates nothing for invalid ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.attackers.crafted_backup import make
from volant.daemon._command_line import parse_command
from volant.daemon._settings import resolve

pytestmark = pytest.mark.programs


def volantd(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs volantd with all its directories below `tmp_path`."""
    environ = {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    environ |= {f"VOLANT_{name}_DIR": str(tmp_path / "default" / name) for name in ("STATE", "RUNTIME", "CACHE")}
    return subprocess.run(
        [sys.executable, "-m", "volant.daemon.main", *words],
        env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_options_work_before_and_after_the_sub_command() -> None:
    for words in (
        "--state-dir /s restore /b --replace",
        "restore --state-dir /s /b --replace",
        "restore --replace /b --state-dir /s",
        "restore --replace --state-dir=/s -- /b",
    ):
        command = parse_command(words.split())
        assert (command.name, command.file, command.replace) == ("restore", Path("/b"), True), words
        settings, _ = resolve(command.flags, {"VOLANT_STATE_DIR": "/other"})
        assert settings.state_dir == Path("/s"), words
    both = parse_command(["--cache-dir", "/c", "--ephemeral", "check", "--state-dir", "/s"])
    assert both == ("check", {"cache_dir": "/c", "ephemeral": True, "state_dir": "/s"}, None, False)
    assert parse_command([]) == ("run", {}, None, False)


@pytest.mark.parametrize(
    "words",
    [
        ("restore",),
        ("restore", "--state-dir", "{state}"),
        ("restore", "--state-dir", "{state}", "{backup}", "{backup}"),
        ("restore", "--stat-dir", "{state}", "{backup}"),
        ("restore", "--nonsense", "{backup}"),
        ("restore", "{backup}", "--state-dir"),
        ("restore", "--state-dir", "relative", "{backup}"),
        ("--replace", "restore", "{backup}"),
        ("check", "{state}"),
        ("check", "--nonsense"),
        ("nonsense", "--state-dir", "{state}"),
    ],
)
def test_wrong_arguments_create_nothing(words: tuple[str, ...], tmp_path: Path) -> None:
    backup = make(tmp_path / "backup.db")
    done = volantd(tmp_path, *(word.format(state=tmp_path / "state", backup=backup) for word in words))
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["backup.db"]


def test_restoring_a_file_that_is_not_a_backup_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "text").write_text("Dear diary, " * 1000)
    (tmp_path / "empty").touch()
    before = sorted(tmp_path.rglob("*"))
    for name in ("directory", "text", "empty", "missing"):
        done = volantd(tmp_path, "restore", "--state-dir", str(tmp_path / "state"), str(tmp_path / name))
        assert done.returncode == 1, done
        assert done.stderr.startswith(f"volantd: {tmp_path / name} "), done
    assert sorted(tmp_path.rglob("*")) == before


def test_a_restore_accepts_options_before_the_file(tmp_path: Path) -> None:
    backup, state = make(tmp_path / "backup.db"), tmp_path / "state"
    flags = [word for name in ("runtime", "cache") for word in (f"--{name}-dir", str(tmp_path / name))]
    done = volantd(tmp_path, "restore", "--state-dir", str(state), *flags, str(backup))
    assert done.returncode == 0, done
    assert done.stdout.startswith(f"restored 1 VMs from {backup}; ")
    assert (state / "volant.db").is_file()
