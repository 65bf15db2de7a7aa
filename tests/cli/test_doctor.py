"""`volar setup --check` shows what volantd finds of this host: for people, for programs, and as an exit code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click
import pytest
import trio
from click.testing import CliRunner, Result

from tests.cli.kit import ENVIRONMENT, ROOT, command
from volant.cli import _doctor, _setup
from volant.cli._volar import volar

FINE = {"check": "qemu", "level": "ok", "found": "QEMU 10"}
LESS = {"check": "kvm", "level": "less", "found": "no \x1b[31mKVM", "means": "it is slow", "advice": "`modprobe kvm`"}
FAILS = {"check": "memory", "level": "fails", "found": "none", "means": "no VM starts", "advice": ""}


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program in volantd's place. It is a script of Python's; see `answering`."""
    path = tmp_path / "volantd.py"
    monkeypatch.setattr(_setup, "command_of", lambda script, module: [sys.executable, str(path)])
    monkeypatch.setattr(_setup, "ENVIRONMENT", tmp_path / "environment")
    return path


def answering(path: Path, *findings: dict[str, str]) -> None:
    report = json.dumps({"user": "me", "findings": findings})
    path.write_text(f"import sys; assert sys.argv[1:] == ['check']; print({report!r})")


def check(*words: str) -> Result:
    return CliRunner().invoke(volar, ["setup", "--check", *words], standalone_mode=False)


def test_people_see_the_finding_its_consequence_and_the_advice(says: Path) -> None:
    answering(says, FINE, LESS)
    done = check()
    assert done.return_value == 0, done.stderr
    assert done.stdout == (
        "ok     qemu  QEMU 10\n"
        "less   kvm   no \\x1b[31mKVM\n"
        "             it is slow\n"
        "             → `modprobe kvm`\n"
        "\n"
        "VMs can run here with volantd as me, with limits: kvm\n"
    )


def test_a_failed_check_is_in_the_last_line_and_the_exit_code(says: Path) -> None:
    answering(says, FINE, LESS, FAILS)
    done = check()
    assert done.return_value == 1
    assert done.stdout.splitlines()[-1] == "VMs can't run here with volantd as me: memory"


def test_a_host_that_lacks_nothing_is_reported(says: Path) -> None:
    answering(says, FINE)
    assert check().stdout.splitlines()[-1] == "VMs can run here with volantd as me"


def test_programs_get_the_whole_report(says: Path) -> None:
    answering(says, FINE, FAILS)
    done = check("--json")
    assert done.return_value == 1
    document = json.loads(done.stdout)
    assert (document["ok"], document["user"]) == (False, "me")
    assert document["findings"][1] == FAILS


def test_the_environment_overrides_the_services_settings(
    says: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "environment").write_text('# mine\nVOLANT_STATE_DIR="/srv/a"\nVOLANT_CACHE_DIR=/srv/b\n')
    monkeypatch.setenv("VOLANT_CACHE_DIR", "/srv/c")
    found = "{os.environ['VOLANT_STATE_DIR']} {os.environ['VOLANT_CACHE_DIR']}"
    says.write_text(
        "import json, os\n"
        f"finding = dict(check='x', level='ok', found=f\"{found}\")\n"
        "print(json.dumps(dict(user='me', findings=[finding])))"
    )
    assert "/srv/a /srv/c" in check().stdout


def test_settings_with_which_volantd_would_not_start_are_reported(says: Path) -> None:
    says.write_text("import sys; print('volantd: max_vms is no number', file=sys.stderr); sys.exit(2)")
    done = check()
    assert done.return_value == 1
    assert "volar: max_vms is no number" in done.stderr


def test_a_volantd_without_a_valid_report_is_an_error(says: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says.write_text("raise SystemExit('broken')")
    done = check()
    assert done.return_value == 1
    assert "failed with 1: broken" in done.stderr
    says.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(_doctor, "_TIMEOUT_S", 0.5)
    assert "longer than 0.5 s" in check().stderr


@pytest.mark.parametrize("other", ["--dry-run", "--uninstall", "--purge"])
def test_check_can_not_be_combined_with_changes(says: Path, other: str) -> None:
    assert isinstance(check(other).exception, click.UsageError)


async def test_the_real_check_needs_no_daemon(tmp_path: Path) -> None:
    env = ENVIRONMENT | {
        "VOLANT_STATE_DIR": str(tmp_path / "state"),
        "VOLANT_RUNTIME_DIR": f"/tmp/volant-{os.getpid()}",
    }
    with trio.fail_after(90):
        done = await trio.run_process(
            command("setup", "--check", "--json"), capture_stdout=True, check=False, env=env, cwd=ROOT
        )
    document = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 1)
    assert {"qemu", "kvm", "memory", "state", "systemd"} <= {finding["check"] for finding in document["findings"]}
    assert not await trio.Path(tmp_path / "state").exists()
