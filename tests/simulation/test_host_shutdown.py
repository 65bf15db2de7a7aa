"""When the host shuts down, guests are shut down some at a time, each within its grace, all within a limit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from actors.testing import Simulation, simulate
from tests.simulated import World, simulated_world
from tests.simulated.guest import answer
from tests.simulated.host import SimHost
from tests.simulated.qemu import SimQemu
from volant.daemon.guests import AT_ONCE, GRACE_S, TOTAL_S, stop_guests
from volant.hypervisor.qemu import QemuHypervisor
from volant.model import ProcessIdentity


class Watched:
    """Sees who is asked, and makes guests as they should be."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.most = 0

    def make(self, qemu: SimQemu, kind: str) -> None:
        """`polite`; `slow` and `paused`, and polite; `stubborn`: says that it will, and does not; `mute`: says nothing;
        `unkillable`: stubborn, and its hypervisor survives its SIGKILL for long."""
        if kind == "unkillable":
            qemu.process.stubborn_s = 1000.0
            qemu.deaf_to.add("quit")
        polite = qemu.guest.when_asked_to_stop

        async def watched(stream: Any) -> None:
            self.asked.add(qemu.tag)
            self.most = max(self.most, sum(tag in self.asked for tag in self._living))
            if kind == "mute":
                await trio.sleep_forever()
            if kind == "slow":
                await trio.sleep(10)
            if kind in ("stubborn", "unkillable"):
                await answer(stream, 202, {})
            else:
                await polite(stream)

        qemu.guest.when_asked_to_stop = watched

    @property
    def _living(self) -> list[str]:
        return [qemu.tag for qemu in self.world.machine.running()]

    world: World


def goes_down(
    directory: Path, *guests: tuple[int, str], then: Callable[[Watched, list[ProcessIdentity], float], Awaitable[None]]
) -> None:
    """A daemon has booted so many guests of each kind and stopped; the host goes down; `then` looks."""

    async def main(sim: Simulation) -> None:
        watched = Watched()
        async with simulated_world(sim, directory) as world:
            watched.world = world
            await world.start_daemon()
            kinds = [kind for count, kind in guests for _ in range(count)]
            body = {"cpu_cores": 1, "memory_mb": 64}
            for number in range(len(kinds)):
                made = await world.request(
                    "POST", "/api/v1/vms", {"name": f"vm{number}", **body}, {"content-type": "application/json"}
                )
                assert made.status == 201, made.body
            for number in range(len(kinds)):
                answered = await world.request("GET", f"/api/v1/vms/vm{number}?wait=running&timeout=10m")
                assert answered.json()["status"] == "running"
                if kinds[number] == "paused":
                    paused = await world.request("POST", f"/api/v1/vms/vm{number}/pause?wait=paused")
                    assert paused.json()["status"] == "paused"
            await world.stop_daemon()
            for qemu, kind in zip(world.machine.running(), kinds, strict=True):
                watched.make(qemu, kind)
            host = SimHost(world.machine)
            began = trio.current_time()
            left = await stop_guests(world.settings, host, QemuHypervisor(host, world.settings.cache_dir))
            await then(watched, left, trio.current_time() - began)
            host.die()

    simulate(main, seed=3, faults={})


def test_thirty_guests_are_shut_down_though_some_ignore_it(tmp_path: Path) -> None:
    async def then(watched: Watched, left: list[ProcessIdentity], took_s: float) -> None:
        assert left == []
        assert len(watched.asked) == 30
        assert 2 <= watched.most <= AT_ONCE
        assert took_s < TOTAL_S
        assert not watched.world.machine.running()
        # It is memory of a host that may stay up.
        assert not [path for path in watched.world.machine.files.below(Path("/dev/shm")) if path.suffix == ".mem"]

    goes_down(tmp_path, (10, "polite"), (10, "mute"), (10, "stubborn"), then=then)


def test_a_guest_that_ignores_its_shutdown_gets_its_grace_and_no_more(tmp_path: Path) -> None:
    async def then(watched: Watched, left: list[ProcessIdentity], took_s: float) -> None:
        assert left == []
        assert GRACE_S <= took_s < GRACE_S + 10

    goes_down(tmp_path, (1, "stubborn"), then=then)


def test_a_guest_without_an_agent_is_not_awaited(tmp_path: Path) -> None:
    async def then(watched: Watched, left: list[ProcessIdentity], took_s: float) -> None:
        assert left == []
        assert took_s < GRACE_S

    goes_down(tmp_path, (3, "mute"), then=then)


def test_a_slow_guest_is_not_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def then(watched: Watched, left: list[ProcessIdentity], took_s: float) -> None:
        assert left == []
        assert took_s >= 10

    with caplog.at_level("INFO", "volant.guests"):
        goes_down(tmp_path, (2, "slow"), then=then)
    assert caplog.text.count("the guest shut down") == 2
    assert "is killed" not in caplog.text


def test_a_paused_guest_is_shut_down_too(tmp_path: Path) -> None:
    async def then(watched: Watched, left: list[ProcessIdentity], took_s: float) -> None:
        assert left == []
        assert len(watched.asked) == 4

    goes_down(tmp_path, (2, "paused"), (2, "polite"), then=then)


def test_every_guest_is_asked_however_many_ignore_it(tmp_path: Path) -> None:
    async def then(watched: Watched, left: list[ProcessIdentity], took_s: float) -> None:
        assert left == []
        assert len(watched.asked) == 40
        # At the end not some at a time, as these would not be asked at all.
        assert watched.most > AT_ONCE
        assert took_s < TOTAL_S

    goes_down(tmp_path, (36, "stubborn"), (4, "polite"), then=then)


def test_the_shutdown_ends_in_time_and_reports_remaining_processes(tmp_path: Path) -> None:
    async def then(watched: Watched, left: list[ProcessIdentity], took_s: float) -> None:
        assert len(left) == len(watched.world.machine.running()) == 12
        assert took_s < TOTAL_S + 5

    goes_down(tmp_path, (12, "unkillable"), (3, "polite"), then=then)
