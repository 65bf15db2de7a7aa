"""Many simulation runs with faults and kills: nothing acknowledged is lost, and all comes to rest.

`python -m tests.simulation` makes more runs, and repeats one that failed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.testing import Simulation, allow_real, check_deterministic
from tests.simulated import simulated_world
from tests.simulation.scenario import FAULTS, Scenario, Seen, run_seed
from tests.system.kit import load

REPOSITORY = Path(__file__).resolve().parents[2]
SEEDS = load("VOLANT_TEST_SEEDS", usual=60, full=300)
_PATIENCE_S = 900.0

FOUND = {
    0: "after a reboot of the host a VM's actor died of its console's file, which had been in RAM",
    3: "a hypervisor that outlived its SIGKILL for 30 s was never killed again",
    362: "a guest was told twice at once whom it reaches, and done with the older of the two last",
    1393: "a guest took what it was told of its network when nobody waited any more, and was believed not to have",
    1582: "a tap that could not be put back, when all of them were, was never tried again, though its VM ran",
    3171: "a process that was killed and did not go yet went on answering, and was taken for a VM's",
}
"""Bugs that runs have found, by seed."""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(sys.version_info < (3, 12), reason="on Python 3.11 the same runs take five times as long")
def test_all_runs_pass_and_many_cover_every_fault_and_transition() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seeds", str(SEEDS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"


@pytest.mark.parametrize("seed", FOUND, ids=str)
def test_found_bugs_stay_fixed(seed: int, tmp_path: Path) -> None:
    run_seed(seed, tmp_path)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    directory = tmp_path / "state"

    async def main(sim: Simulation) -> Any:
        with allow_real("files"):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        async with simulated_world(sim, directory) as world:
            await Scenario(sim, world, Seen()).run()

    check_deterministic(main, seed=7, faults=FAULTS, limit_steps=20_000_000)
