"""`volar setup` tells plainly why it can't, and a dry run tells all and does nothing."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from volant.cli import _setup
from volant.cli._volar import volar


@pytest.fixture(autouse=True)
def nothing_is_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever host the tests run on."""
    (tmp_path / "systemd").mkdir()
    (tmp_path / "units").mkdir()
    monkeypatch.setattr(_setup, "_BOOTED", tmp_path / "systemd")
    monkeypatch.setattr(_setup, "DIRECTORY", tmp_path / "units")
    monkeypatch.setattr(_setup, "ENVIRONMENT", tmp_path / "volantd")

    def no_program(*command: str) -> None:
        raise AssertionError(command)

    monkeypatch.setattr(_setup, "_run", no_program)


def setup(*words: str) -> Result:
    return CliRunner().invoke(volar, ["setup", *words], standalone_mode=False)


def test_without_systemd_setup_fails_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "systemd").rmdir()
    for words in ((), ("--uninstall",)):
        done = setup(*words)
        assert done.return_value == 1
        assert "this host does not run systemd" in done.stderr
        assert "run it in a terminal" in done.stderr


def test_setup_needs_root_and_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for words in ((), ("--uninstall",)):
        done = setup(*words)
        assert done.return_value == 1
        assert "only root can" in done.stderr
        assert "--dry-run" in done.stderr


def test_a_dry_run_needs_nothing_prints_everything_and_does_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (tmp_path / "systemd").rmdir()
    done = setup("--dry-run")
    assert done.return_value == 0, done.stderr
    for name, text in _setup.rendered().items():
        assert f"# write {tmp_path / 'units' / name}\n{text}" in done.stdout
    ran = [line for line in done.stdout.splitlines() if line.startswith("# run systemctl ")]
    assert [line.split()[4] for line in ran] == ["daemon-reload", "enable", "stop", "restart", "start", "restart"]
    assert list((tmp_path / "units").iterdir()) == []

    done = setup("--uninstall", "--purge", "--dry-run")
    assert done.return_value == 0, done.stderr
    for name in _setup.UNITS:
        assert f"# remove {tmp_path / 'units' / name}\n" in done.stdout
    assert "# remove /var/lib/volant\n" in done.stdout


def test_addresses_in_the_settings_that_have_no_effect_are_reported(tmp_path: Path) -> None:
    assert "VOLANT_API_LISTEN_ADDR" not in setup("--dry-run").stderr
    (tmp_path / "volantd").write_text('# mine\nVOLANT_API_LISTEN_ADDR="0.0.0.0:80"\nVOLANT_MAX_VMS=3\n')
    done = setup("--dry-run")
    assert "VOLANT_API_LISTEN_ADDR=0.0.0.0:80 in" in done.stderr
    assert "systemctl edit volantd.socket" in done.stderr


def test_options_of_uninstall_are_refused_without_it() -> None:
    assert isinstance(setup("--purge").exception, click.UsageError)
