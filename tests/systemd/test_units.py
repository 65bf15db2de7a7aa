"""What the units allow is little, and systemd understands all of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from volant.cli._setup import rendered

SERVICES = ("volantd.service", "volant-guests.service")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    command: Sequence[str] = ["systemd-analyze", "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    for name, text in rendered().items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", SERVICES)
def test_systemd_takes_the_exposure_of_a_service_for_at_most_three_of_ten(units: Path, name: str) -> None:
    done = analyze("security", "--offline=true", "--threshold=30", str(units / name))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_the_threshold_is_one(units: Path) -> None:
    bare = "[Service]\nExecStart=/bin/true\n"
    (units / "bare.service").write_text(bare)
    assert analyze("security", "--offline=true", "--threshold=30", str(units / "bare.service")).returncode == 1


def test_systemd_has_nothing_to_say_against_the_units(units: Path) -> None:
    done = analyze("verify", "--man=no", "--recursive-errors=no", *(str(units / name) for name in rendered()))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_daemon_can_not_take_all_memory_of_the_host(units: Path) -> None:
    found = re.search(r"^MemoryMax=(\d+)%$", (units / "volantd.service").read_text(), re.MULTILINE)
    assert found is not None
    # The files in /dev/shm, half of the memory, are counted as the daemon's.
    assert 50 < int(found[1]) < 90
