"""`-p tests.resume`: a run that was interrupted goes on with what has not passed; changed files run from the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.kit import REPOSITORY

pytestmark = pytest.mark.programs

TESTS = """
import pathlib
import pytest

@pytest.fixture(autouse=True)
def note(request):
    with pathlib.Path(__file__).with_name("ran.ignored").open("a") as file:
        print(request.node.name, file=file)

def test_first(): pass

def test_second():
    interrupted = pathlib.Path(__file__).with_name("interrupted.ignored")
    if not interrupted.exists():
        interrupted.touch()
        pytest.exit("enough")

def test_third(): assert HERE == 1
"""
ALL = ["test_first", "test_second", "test_third"]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.full), 1])
def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, workers: int) -> None:
    file, ran = tmp_path / "test_it.py", tmp_path / "ran.ignored"
    file.write_text(f"{TESTS}\nHERE = 0\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / ".gitignore").write_text("__pycache__\n*.ignored\n")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)

    def run(workers: int) -> list[str]:
        ran.write_text("")
        command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-p", "no:trio", "-p", "tests.resume"]
        command += ["--basetemp", "temporary.ignored", f"--numprocesses={workers}"]
        # A nested run is none of this run's workers.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environ["PYTHONPATH"] = str(REPOSITORY)
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
        print(done.stdout, done.stderr)
        return ran.read_text().split()

    assert run(0) == ALL[:2]
    assert run(workers) == ALL[1:]
    assert run(workers) == ALL[2:], "it has failed"
    file.write_text(f"{TESTS}\nHERE = 1\n")
    assert run(workers) == ALL
    assert run(workers) == ALL, "all had passed"
