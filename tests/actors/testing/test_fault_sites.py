"""A run decides which sites fire and with what effect. A new site changes nothing at others."""

from __future__ import annotations

from errno import ENOSPC
from functools import partial

import pytest
import trio

from actors import fault
from actors.testing import FaultReport, Plan, Simulation, SiteReport, simulate


def fired(plan: Plan, *sites: str, seed: int = 1) -> dict[str, str]:
    """Which of 20 passes of each site fired, as a string of 0 and 1."""

    async def main(sim: Simulation) -> dict[str, str]:
        return {site: "".join(str(int(fault(site))) for _ in range(20)) for site in sites}

    return simulate(main, seed=seed, faults=plan)


def test_outside_of_a_simulation_no_site_fires() -> None:
    assert not fault("a")


def test_a_site_fires_with_its_probability_decided_by_the_seed() -> None:
    one = fired({"a": 0.5}, "a")
    assert one == fired({"a": 0.5}, "a") != fired({"a": 0.5}, "a", seed=2)
    assert 3 < one["a"].count("1") < 17
    assert fired({"a": 1.0}, "a", "b") == {"a": "1" * 20, "b": "0" * 20}
    assert fired({"a": 0.0}, "a") == {"a": "0" * 20}


def test_a_new_site_changes_nothing_at_others() -> None:
    assert fired({"a": 0.5}, "a")["a"] == fired({"*": 0.5}, "b", "a", "c")["a"]


def test_a_firing_site_raises_or_calls_its_effect() -> None:
    async def main(sim: Simulation) -> None:
        done: list[str] = []
        sim.faults.turn_on("disk.*", 1, partial(OSError, ENOSPC, "disk full"))
        sim.faults.turn_on("disk.read", 1, lambda: done.append("read"))
        with pytest.raises(OSError, match="disk full"):
            fault("disk.write")
        assert fault("disk.read")
        assert done == ["read"]
        sim.faults.turn_off("disk.write")
        assert not fault("disk.write")
        sim.faults.turn_on("once", times=1)
        assert [fault("once"), fault("once")] == [True, False]
        sim.faults.turn_off()
        assert not fault("disk.read")

    simulate(main, seed=1)


def test_tasks_that_the_program_starts_have_the_same_faults() -> None:
    async def main(sim: Simulation) -> None:
        async def task() -> None:
            await trio.sleep(1)
            fault("a")

        with pytest.RaisesGroup(KeyError):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task)

    simulate(main, seed=1, faults={"a": (1, KeyError)})


def test_a_probability_is_a_probability() -> None:
    async def main(sim: Simulation) -> None:
        with pytest.raises(ValueError, match="between 0 and 1"):
            sim.faults.turn_on("a", 20)
        with pytest.raises(ValueError, match="times"):
            sim.faults.turn_on("a", 1, times=0)

    simulate(main, seed=1)


def test_the_report_names_sites_never_reached_and_never_fired() -> None:
    async def main(sim: Simulation) -> FaultReport:
        for site in ("seen", "seen", "rare", "forgotten"):
            fault(site)
        return sim.faults.report()

    report = simulate(main, seed=1, faults={"seen": 1.0, "rare": 0.0, "lost.*": 0.5})
    assert report.sites["seen"] == SiteReport(seen=2, fired=2)
    assert report.never_fired == ("rare",)
    assert report.never_reached == ("lost.*",)
    assert report.never_turned_on == ("forgotten",)
    both = report + FaultReport({"rare": SiteReport(3, 1), "lost.a": SiteReport(1, 1)})
    assert both.never_fired == both.never_reached == ()
    assert "never turned on: forgotten" in list(both.lines())
