"""Three hundred lives of a daemon under faults and kills: nothing acknowledged is lost, and all comes to rest.

`python -m tests.simulation` lives more of them, and one again that failed.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.testing import Simulation, allow_real, check_deterministic
from tests.simulated import simulated_world
from tests.simulation.scenario import FAULTS, Life, Seen, live

REPOSITORY = Path(__file__).resolve().parents[2]
SEEDS = 300
_PATIENCE_S = 900.0

FOUND = {
    0: "after a reboot of the host a VM's actor died of its console's file, which had been in RAM",
    3: "a hypervisor that outlived its SIGKILL for 30 s was never killed again",
    362: "a guest was told twice at once whom it reaches, and done with the older of the two last",
    1393: "a guest took what it was told of its network when nobody waited any more, and was believed not to have",
    1582: "a tap that could not be put back, when all of them were, was never tried again, though its VM ran",
    3171: "a process that was killed and did not go yet went on answering, and was taken for a VM's",
}
"""What the first lives brought to light."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(sys.version_info < (3, 12), reason="on Python 3.11 the same runs take five times as long")
def test_all_lives_end_well_and_everything_was_seen() -> None:
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
def test_what_was_found_stays_mended(seed: int, tmp_path: Path) -> None:
    live(seed, tmp_path)


def test_the_same_seed_is_the_same_life(tmp_path: Path) -> None:
    directory = tmp_path / "state"

    async def main(sim: Simulation) -> Any:
        with allow_real("files"):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        async with simulated_world(sim, directory) as world:
            await Life(sim, world, Seen()).run()

    check_deterministic(main, seed=7, faults=FAULTS, limit_steps=20_000_000)
