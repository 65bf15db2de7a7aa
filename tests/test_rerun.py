"""`.ci/test` runs tests that failed once more, alone: it is green if they pass then, and names them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.kit import REPOSITORY

pytestmark = pytest.mark.programs

ONCE = """
def fail_once(name):
    path = pathlib.Path(__file__).with_name(name)
    if not path.exists():
        path.touch()
        raise AssertionError(f"{name} was not there\\nsecond line")
"""
PASSES = "def test_passes(): pass\n"
FAILS_ONCE = "def test_once(): fail_once('once')\n"
FAILS = "def test_always(): assert 1 == 2\n"
ELEVEN_ONCE = "@pytest.mark.parametrize('n', range(11))\ndef test_once(n): fail_once(f'once-{n}')\n"
FIXTURE_ONCE = "@pytest.fixture\ndef broken(): fail_once('fixture')\ndef test_uses_it(broken): pass\n"
TEARDOWN_ONCE = "@pytest.fixture\ndef broken():\n    yield\n    fail_once('teardown')\ndef test_uses_it(broken): pass\n"
WORKER_DIES_ONCE = (
    "def test_dies():\n    path = pathlib.Path(__file__).with_name('died')\n"
    "    if not path.exists():\n        path.touch()\n        os._exit(1)\n"
)
SKIPPED_THEN = (
    "def test_skips():\n    path = pathlib.Path(__file__).with_name('skips')\n"
    "    if path.exists():\n        pytest.skip('not now')\n    fail_once('skips')\n"
)
INTERRUPTED = f"{FAILS_ONCE}def test_interrupts(): pytest.exit('enough')\n"


@dataclass
class Case:
    """A folder with a file of tests for each text, and what a run of it says."""

    files: tuple[str, ...]
    last: str = ""
    """What a green run says at its end, as an expression. A red run has none."""
    runs: int = 2
    options: tuple[str, ...] = ("--numprocesses=2",)


CASES = {
    "all pass": Case((PASSES, PASSES), last=" 2 passed .*", runs=1),
    "one fails once": Case(
        (PASSES, FAILS_ONCE),
        last="failed once, passed alone: 1\ntest_1.py::test_once\n    AssertionError: once was not there",
    ),
    "one process": Case((FAILS_ONCE,), last="test_0.py::test_once\n    .* once was not there", options=()),
    "one fails always": Case((FAILS, FAILS_ONCE)),
    "eleven fail once": Case((ELEVEN_ONCE,), runs=1),
    "a fixture fails once": Case((FIXTURE_ONCE,), last="test_0.py::test_uses_it\n    .* fixture was not there"),
    "a teardown fails once": Case((TEARDOWN_ONCE,), last="test_0.py::test_uses_it\n    .* teardown was not there"),
    "a worker dies": Case((PASSES, WORKER_DIES_ONCE), last="test_1.py::test_dies\n    .* crashed .*"),
    "one is skipped then": Case((SKIPPED_THEN,)),
    "interrupted": Case((INTERRUPTED,), runs=1, options=()),
    "not collected": Case(("import nothing_of_that_name\n", PASSES), runs=1, options=()),
    "a debugger": Case((FAILS_ONCE,), runs=1, options=("-x",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_failed_runs_once_more(case: Case, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for number, text in enumerate(case.files):
        (tmp_path / f"test_{number}.py").write_text(f"import os, pathlib, pytest\n{ONCE}\n{text}")
    command = [".ci/test", "-c", str(tmp_path / "pytest.ini"), "-p", "no:trio", *case.options, str(tmp_path)]
    # A nested run is none of this run's workers.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    print(done.stdout, done.stderr)
    assert done.stdout.count("test session starts") == case.runs
    kept = re.search("The tests wrote into (/tmp/vt.*)", done.stderr)
    if case.last:
        assert (done.returncode, kept) == (0, None)
        assert re.search(f"{case.last}\n$", done.stdout)
    else:
        assert done.returncode
        assert "failed once" not in done.stdout
        assert kept
        shutil.rmtree(kept[1])
