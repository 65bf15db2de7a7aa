"""A VM is paused or running as desired, whatever fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from actors.testing import Simulation
from tests.simulated import World
from tests.simulation.kit import JSON, VMS, run_story
from volant.channel._link import STALL_S
from volant.hypervisor.qemu._machine import PULSE_S

VM = "/api/v1/vms/demo"


def run(directory: Path, story: Callable[[Simulation, World], Awaitable[None]], **faults: float) -> None:
    """Runs a story with one VM, `demo`."""

    async def main(world: World) -> None:
        body = {"name": "demo", "cpu_cores": 1, "memory_mb": 64, "boot": "cold"}
        assert (await world.request("POST", f"{VMS}?wait=running", body, JSON)).json()["status"] == "running"
        await story(world.sim, world)

    run_story(directory, main, seed=11, **faults)


async def post(world: World, path: str, expected: int = 200) -> Any:
    answer = await world.request("POST", f"{VM}/{path}")
    assert answer.status == expected, answer.body
    return answer.json()


async def until(world: World, status: str) -> Any:
    answer = await world.request("GET", f"{VM}?wait={status}&timeout=10m")
    assert answer.headers["volant-wait"] == "met", answer
    return answer.json()


def machine(world: World) -> str:
    """What the one hypervisor does."""
    [qemu] = world.machine.running()
    return qemu.status


def test_a_vm_paused_for_half_a_day_is_left_alone(tmp_path: Path) -> None:
    async def story(sim: Simulation, world: World) -> None:
        vm = await post(world, "pause?wait=paused")
        assert (vm["status"], vm["desired"], machine(world)) == ("paused", "paused", "paused")
        assert (await world.request("GET", f"{VM}/agent/healthz")).status == 409
        await trio.sleep(60)
        before = sim.steps
        await trio.sleep(12 * 3600)
        # The simulated machine itself takes some; else there is a question now and then whether it hangs.
        assert sim.steps - before < 12 * 3600 + 100 * 12 * 3600 / PULSE_S
        vm = await post(world, "resume?wait=running")
        assert (vm["status"], vm["desired"], vm["reason"], machine(world)) == ("running", "running", None, "running")
        await trio.sleep(STALL_S)
        shown = (await world.request("GET", f"{VM}/inspect")).json()["actor"]["actor"]["process"]
        assert (shown["channel"]["links"], shown["output_error"]) == (1, None)

    run(tmp_path, story)


def test_a_failed_pause_is_undone_with_a_reason(tmp_path: Path) -> None:
    async def story(sim: Simulation, world: World) -> None:
        vm = await post(world, "pause")
        assert (vm["status"], vm["desired"]) == ("running", "paused")
        with trio.fail_after(60):
            while vm["desired"] != "running" or (vm["reason"] or {}).get("code") != "pause_failed":
                await trio.sleep(0.1)
                vm = (await world.request("GET", VM)).json()
        assert "a device is busy" in vm["reason"]["message"]
        assert machine(world) == "running"
        sim.faults.turn_off()
        assert (await post(world, "pause?wait=paused"))["reason"] is None
        assert machine(world) == "paused"

    run(tmp_path, story, qemu__refuses_stop=1.0)


def test_a_failed_resume_is_retried_and_can_be_stopped(tmp_path: Path) -> None:
    async def story(sim: Simulation, world: World) -> None:
        await post(world, "pause?wait=paused")
        await post(world, "resume")
        await trio.sleep(300)
        vm = (await world.request("GET", VM)).json()
        assert (vm["status"], vm["desired"], vm["reason"]["code"]) == ("paused", "running", "resume_failed")
        # Its guest can't be asked.
        assert (await post(world, "stop?grace=10s&wait=stopped"))["status"] == "stopped"
        assert not world.machine.running()
        sim.faults.turn_off()
        await post(world, "start?wait=running")

    run(tmp_path, story, qemu__refuses_cont=1.0)


def test_a_guest_whose_clock_can_not_be_set_runs_with_a_warning(tmp_path: Path) -> None:
    async def story(sim: Simulation, world: World) -> None:
        await post(world, "pause?wait=paused")
        [qemu] = world.machine.running()

        async def sleeps(*request: object) -> None:
            await trio.sleep_forever()

        qemu.guest.serve = sleeps  # type: ignore[method-assign,assignment]
        vm = await post(world, "resume?wait=running")
        assert (vm["status"], vm["reason"]["code"]) == ("running", "clock_not_set")

    run(tmp_path, story)


def test_the_next_daemon_pauses_or_resumes_the_guest_as_desired(tmp_path: Path) -> None:
    async def story(sim: Simulation, world: World) -> None:
        [qemu] = world.machine.running()

        def stop(yes: bool) -> None:
            qemu.status = "paused" if yes else "running"
            (qemu.guest.pause if yes else qemu.guest.resume)()

        for command, status in (("pause", "paused"), ("resume", "running")):
            await post(world, f"{command}?wait={status}")
            newest = world.daemon.store.projection.last_event
            for found in (True, False):
                await world.kill_daemon()
                # As one leaves it that is killed while it copies the guest, or as somebody else does.
                stop(found)
                await world.start_daemon()
                with trio.fail_after(60):
                    while qemu.status != status:  # noqa: ASYNC110 - nothing tells
                        await trio.sleep(0.1)
                assert (await until(world, status))["status"] == status
            assert world.daemon.store.projection.last_event == newest, "adoption is no event"

    run(tmp_path, story)


def test_the_next_daemon_completes_a_pause_or_resume(tmp_path: Path) -> None:
    async def story(sim: Simulation, world: World) -> None:
        for command, status in (("pause", "paused"), ("resume", "running")) * 10:
            await post(world, command)
            await trio.sleep(sim.rng.uniform(0.0, 0.02))
            await world.kill_daemon()
            await world.start_daemon()
            await until(world, status)
            assert machine(world) == status

    run(tmp_path, story)


def test_a_paused_vm_that_must_boot_again_is_paused_once_it_runs(tmp_path: Path) -> None:
    async def story(sim: Simulation, world: World) -> None:
        await post(world, "pause?wait=paused")
        await world.power_cut()
        await world.start_daemon()
        vm = await until(world, "running,stopped")
        assert (await until(world, "paused"))["boots"] == 2
        assert machine(world) == "paused"

        # Set aside for maintenance, likewise.
        assert (await world.request("POST", "/api/v1/system/drain?stop_vms=true&grace=5s")).status == 200
        vm = await until(world, "stopped")
        assert vm["desired"] == "paused"
        assert (await world.request("POST", "/api/v1/system/undrain")).status == 200
        vm = await until(world, "paused")
        assert (vm["boots"], vm["desired"], machine(world)) == (3, "paused", "paused")

    run(tmp_path, story)
