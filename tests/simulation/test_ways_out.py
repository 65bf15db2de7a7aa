"""Every state can be left, and `inspect` says how long each step may take and what follows."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.simulated import World
from tests.simulation.kit import JSON, run_story
from volant.hypervisor.qemu._machine import PULSE_ANSWER_S, PULSE_S, PULSE_TOGETHER_S, PULSES_MISSED
from volant.logs import VmLogs
from volant.model import MAX_RESTARTS, ProcessIdentity

run = partial(run_story, seed=5, limit_s=7200)


async def create(world: World, **fields: object) -> None:
    body = {"name": "demo", "cpu_cores": 1, "memory_mb": 64, **fields}
    assert (await world.request("POST", "/api/v1/vms", body, JSON)).status == 201


async def wait_for(world: World, status: str) -> Any:
    answer = await world.request("GET", f"/api/v1/vms/demo?wait={status}&timeout=10m")
    assert answer.headers["volant-wait"] == "met", answer
    return answer.json()


async def running(world: World) -> Any:
    await create(world)
    return await wait_for(world, "running")


async def look(world: World) -> Any:
    return (await world.request("GET", "/api/v1/vms/demo/inspect")).json()["actor"]["actor"]


async def until(world: World, fits: Callable[[Any], bool]) -> Any:
    """What `inspect` says of the actor, once it is so."""
    while True:
        shown = await look(world)
        if fits(shown):
            return shown
        await trio.sleep(0.05)


async def step(world: World, name: str) -> Any:
    """Wait until that step is under way; how `inspect` shows it."""
    return (await until(world, lambda shown: shown["step"] is not None and shown["step"]["name"] == name))["step"]


def _restarted(before: int, shown: Any) -> bool:
    return bool(shown["restarts"]["done"] > before)


def test_a_restart_policy_backs_off_shows_when_and_gives_up(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world, restart_policy="on-failure")
        delays = []
        for restart in range(MAX_RESTARTS):
            shown = await step(world, "RestartLater")
            assert 0 <= shown["left_s"] <= shown["limit_s"]
            delays.append(shown["limit_s"])
            assert (await look(world))["restarts"] == {"policy": "on-failure", "done": restart, "limit": MAX_RESTARTS}
            await until(world, partial(_restarted, restart))
        assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
        await until(world, lambda shown: shown["step"] is None)
        vm = (await world.request("GET", "/api/v1/vms/demo")).json()
        assert (vm["status"], vm["restarts"], vm["reason"]["code"]) == ("crashed", MAX_RESTARTS, "guest_panicked")
        await trio.sleep(600)
        assert (await world.request("GET", "/api/v1/vms/demo")).json()["boots"] == MAX_RESTARTS + 1
        # Whoever wants it tried again says so.
        await world.request("POST", "/api/v1/vms/demo/start")
        assert (await look(world))["restarts"]["done"] == 0

    run(tmp_path, story, guest__panics_at_boot=1.0)


def test_each_step_reports_its_deadline(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world)
        booting = await step(world, "AwaitAgent")
        assert booting["limit_s"] == world.settings.agent_timeout_s
        crashed = await wait_for(world, "crashed")
        assert crashed["reason"]["code"] == "agent_timeout"
        history = (await look(world))["history"]
        assert [entry["saw"].partition(":")[0] for entry in history][:3] == ["Woke", "ImageReady", "Launched"]
        assert any(entry["saw"].startswith("StepFailed: agent_timeout") for entry in history)

    run(tmp_path, story, guest__never_answers=1.0)


def test_a_hypervisor_that_hangs_at_its_start_is_abandoned(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world)
        crashed = await wait_for(world, "crashed")
        assert crashed["reason"]["code"] in ("no_answer", "launch_timeout")
        await world.request("DELETE", "/api/v1/vms/demo")
        assert not world.machine.running()

    run(tmp_path, story, qemu__hangs_at_start=1.0)


async def boot_of_an_image(world: World) -> None:
    world.machine.registry.push("app")
    await create(world, image="app", boot="cold")


def test_a_disk_that_is_gone_is_not_replaced_by_an_empty_one(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await boot_of_an_image(world)
        await wait_for(world, "running")
        await world.request("POST", "/api/v1/vms/demo/stop")
        await wait_for(world, "stopped")
        files = world.machine.files
        [layer] = [path for path in files.below(world.settings.state_dir / "disks") if path.suffix == ".qcow2"]
        disk = files.file(layer)
        files.unlink(layer)
        await world.request("POST", "/api/v1/vms/demo/start")
        crashed = await wait_for(world, "crashed")
        assert crashed["reason"]["code"] == "disk_missing"
        assert f"{layer.relative_to(world.settings.state_dir)} is gone" in crashed["reason"]["message"]
        assert files.find(layer) is None
        assert not world.machine.running()
        files.put(layer, disk)
        await world.request("POST", "/api/v1/vms/demo/start")
        assert (await wait_for(world, "running"))["reason"] is None
        assert files.find(layer) is disk

    run(tmp_path, story)


def test_a_root_filesystem_that_can_not_be_mounted_fails_the_boot(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await boot_of_an_image(world)
        while not world.machine.running():
            await world.machine.changed.wait()
        [qemu] = world.machine.running()
        qemu.guest.root, qemu.guest.root_detail = "failed", "EXT4-fs (vda): no journal found"
        crashed = await wait_for(world, "crashed")
        assert crashed["reason"]["code"] == "rootfs_failed"
        assert qemu.guest.root_detail in crashed["reason"]["message"]

    run(tmp_path, story)


def test_a_guest_that_ignores_its_stop_is_killed_after_its_grace(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await running(world)
        began = trio.current_time()
        await world.request("POST", "/api/v1/vms/demo/stop?grace=20s")
        assert (await step(world, "AskStop"))["limit_s"] == 20
        await wait_for(world, "stopped")
        assert 20 <= trio.current_time() - began < 25

    run(tmp_path, story, guest__ignores_shutdown=1.0)


def test_a_process_that_outlives_its_kill_is_killed_until_it_is_gone(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await running(world)
        await world.request("POST", "/api/v1/vms/demo/stop?grace=0s")
        assert (await step(world, "Kill"))["limit_s"] == 30
        await trio.sleep(35)
        # It says so meanwhile.
        assert (await world.request("GET", "/api/v1/vms/demo")).json()["reason"]["code"] == "unkillable"
        assert (await wait_for(world, "stopped"))["reason"] is None

    run(tmp_path, story, process__is_stubborn=1.0)


def test_a_process_is_killed_once_the_host_has_descriptors_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await running(world)
        processes = world.daemon.host.processes
        # More than an actor may crash.
        refusals = [OSError(errno.EMFILE, "Too many open files")] * 10
        end_all = processes.end_all

        async def refuse(tag: str, known: ProcessIdentity | None = None) -> None:
            if refusals:
                raise refusals.pop()
            await end_all(tag, known)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "end_all", refuse)
            await world.request("POST", "/api/v1/vms/demo/stop?grace=0s")
            assert (await wait_for(world, "stopped"))["reason"] is None
        assert not refusals
        assert not world.machine.running()

    run(tmp_path, story)


def test_a_hanging_hypervisor_is_killed_with_a_reason(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await running(world)
        await trio.sleep(1000)
        assert (await world.request("GET", "/api/v1/vms/demo")).json()["pid"] == vm["pid"]
        world.machine.running()[0].frozen = True
        began = trio.current_time()
        crashed = await wait_for(world, "crashed")
        assert trio.current_time() - began <= PULSE_S + PULSE_TOGETHER_S + PULSES_MISSED * PULSE_ANSWER_S + 1
        assert crashed["reason"]["code"] == "hypervisor_error"
        assert f"process {vm['pid']} did not answer" in crashed["reason"]["message"]
        await trio.sleep(1)
        assert not world.machine.running()

    run(tmp_path, story)


def test_a_hypervisor_that_hangs_for_a_moment_is_left_alone(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await running(world)
        qemu = world.machine.running()[0]
        for _ in range(4):
            qemu.frozen = True
            await trio.sleep(PULSE_ANSWER_S * (PULSES_MISSED - 1))
            qemu.frozen = False
            await trio.sleep(PULSE_ANSWER_S + PULSE_S)
        after = (await world.request("GET", "/api/v1/vms/demo")).json()
        assert (after["status"], after["pid"]) == ("running", vm["pid"])

    run(tmp_path, story)


def test_closing_a_log_is_retried_and_the_vm_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in seed 2223, whose disk was full."""
    forget, full = VmLogs.forget, True

    async def forget_once_there_is_room(logs: VmLogs, vm_id: int, keep_s: float = 86400.0) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        await forget(logs, vm_id, keep_s)

    monkeypatch.setattr(VmLogs, "forget", forget_once_there_is_room)

    async def story(world: World) -> None:
        nonlocal full
        await running(world)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.request, "DELETE", "/api/v1/vms/demo")
            await trio.sleep(50)
            vm = (await world.request("GET", "/api/v1/vms/demo")).json()
            vm = (await world.request("GET", "/api/v1/vms/demo")).json()
            assert (vm["status"], vm["reason"]["code"]) == ("deleting", "not_removed")
            full = False
        await trio.sleep(60)
        assert (await world.request("GET", "/api/v1/vms/demo")).status == 404

    run(tmp_path, story)
