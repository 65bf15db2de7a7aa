"""The pytest plugin: one item for all seeds, and one command that replays a failure."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

TESTS = """
import pytest
import trio
from actors import fault

pytestmark = pytest.mark.filterwarnings("error")
seen = []

@pytest.fixture
def three():
    return 3

@pytest.mark.simulated(seeds=4, faults={"disk.write": 0.5, "disk.lost": 0.1}, limit_s=100)
async def test_marked(sim, three):
    seen.append(sim.seed)
    fault("disk.write")
    fault("disk.read")
    await trio.sleep(50)
    assert three == 3

@pytest.mark.simulated
class TestClass:
    @pytest.mark.parametrize("n", [1, 2])
    async def test_method(self, sim, n):
        await trio.sleep(n)

def test_plain(simulations):
    async def main(sim):
        await trio.sleep(1)
        return sim.seed
    returned = simulations.run(main, seeds=[5, 6])
    assert returned == list(simulations.seeds([5, 6]))

@pytest.mark.simulated(seeds=20)
async def test_rarely_wrong(sim):
    await trio.sleep(sim.rng.random())
    sim.note("so far so good")
    assert sim.seed != 7

async def test_of_pytest_trio(autojump_clock):
    await trio.sleep(1000)
"""


def pytest_(folder: Path, *args: str) -> tuple[int, str]:
    """Runs pytest with the plugin in `folder`; its exit code and what it printed."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "actors.testing.plugin", "-p", "no:cacheprovider", *args],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ran.returncode, ran.stdout + ran.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\naddopts = --strict-markers\n")
    return tmp_path


def test_a_failure_shows_the_command_that_replays_it(folder: Path) -> None:
    code, text = pytest_(folder)
    assert code == 1
    assert "1 failed, 5 passed" in text
    assert "so far so good" in text
    (command,) = set(re.findall(r"^replay: (.*)$", text, re.MULTILINE))
    assert command.endswith("test_it.py::test_rarely_wrong --sim-seed 7")
    assert f"Replay it with: {command}" in text
    words = shlex.split(command)
    assert words[1:3] == ["-m", "pytest"]
    code, text = pytest_(folder, *words[3:])
    assert code == 1
    assert "simulation with seed 7" in text.lower()
    assert "1 runs, " in text
    code, text = pytest_(folder, "test_it.py::test_rarely_wrong", "--sim-seed", "6", "--sim-seed", "8", "--sim-check")
    assert code == 0
    assert "2 runs, " in text


def test_the_summary_shows_fault_sites(folder: Path) -> None:
    code, text = pytest_(folder, "-k", "marked or method or plain", "--sim-seeds", "30")
    assert code == 0
    assert "120 runs, 1,620 virtual seconds" in text
    assert re.search(r"disk\.write  seen +30  fired +\d+", text)
    assert "turned on, but never reached: disk.lost" in text
    assert "never turned on: disk.read" in text


def test_other_tests_are_left_alone(folder: Path) -> None:
    code, text = pytest_(folder, "-k", "pytest_trio")
    assert code == 0
    assert "simulations" not in text
    (folder / "test_it.py").write_text("import sys\ndef test(): assert 'trio.testing' not in sys.modules\n")
    code, text = pytest_(folder, "-p", "no:trio", "-p", "no:schemathesis", "-o", "addopts=", "-W", "ignore")
    assert code == 0, text


def test_mistakes_are_errors_that_name_them(folder: Path) -> None:
    (folder / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.simulated\n"
        "def test_plain(sim): pass\n"
        "@pytest.mark.simulated\n"
        "async def test_without(): pass\n"
        "@pytest.mark.simulated(5)\n"
        "async def test_position(sim): pass\n"
    )
    code, text = pytest_(folder)
    assert code == 1
    assert "a plain one uses the fixture `simulations`" in text
    assert "takes `sim`, its Simulation" in text
    assert "takes its arguments by name" in text
    code, text = pytest_(folder, "--sim-seeds", "0")
    assert code == 4
    assert "--sim-seeds must be at least 1" in text
