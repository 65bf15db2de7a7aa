"""What simulation tests share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from actors.testing import Simulation, simulate
from tests.simulated import World, simulated_world

JSON = {"content-type": "application/json"}
VMS = "/api/v1/vms"


def run_story(
    directory: Path,
    story: Callable[[World], Awaitable[None]],
    *,
    seed: int,
    limit_s: float = 86_400.0,
    **faults: float,
) -> None:
    """Runs a story on a simulated machine with a daemon. `limit_s` is in virtual seconds. `faults` are probabilities;
    `disk__full` stands for the fault `disk.full`."""

    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, directory) as world:
            await world.start_daemon()
            await story(world)

    chances = {name.replace("__", "."): chance for name, chance in faults.items()}
    simulate(main, seed=seed, faults=chances, limit_s=limit_s, limit_steps=20_000_000)
