"""A copy of a guest is used unchanged, or refused with a reason. No command waits for a copy."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.simulated import Answer, Unreachable, World
from tests.simulated.qemu import SimQemu
from tests.simulation.kit import JSON, VMS, run_story
from tests.simulation.volume_user import VOLUMES, files, settled


def run(directory: Path, story: Callable[[World], Awaitable[None]]) -> None:
    """Runs a story with one VM, `demo`."""

    async def main(world: World) -> None:
        body = {"name": "demo", "cpu_cores": 1, "memory_mb": 64, "boot": "cold"}
        assert (await world.request("POST", f"{VMS}?wait=running", body, JSON)).json()["status"] == "running"
        await story(world)

    run_story(directory, main, seed=11)


async def snapshot(world: World) -> Path:
    """Where a snapshot of the VM lies."""
    answer = await world.request("POST", f"{VMS}/demo/snapshots", {"name": "warm"}, JSON)
    assert answer.status == 201, answer.body
    [kept] = world.daemon.store.projection.snapshots.values()
    return world.settings.state_dir / "snapshots" / kept.checkpoint


async def restore(world: World, name: str) -> Any:
    answer = await world.request(
        "POST", f"{VMS}?wait=running,crashed&timeout=2m", {"name": name, "from_snapshot": "warm"}, JSON
    )
    assert answer.status == 201, answer.body
    return answer.json()


async def stands_still(qemu: SimQemu) -> None:
    with trio.fail_after(20):
        while qemu.status != "paused":  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.01)


def copies(world: World) -> list[Path]:
    """What lies there of checkpoints, whole or half."""
    files = world.machine.files
    roots = [Path("/dev/shm"), world.settings.state_dir / "snapshots"]
    found = [path for root in roots if files.find(root) for path in files.below(root)]
    return [path for path in found if any(part.startswith(("fork-", "snapshot-")) for part in path.parts)]


def rewrite(world: World, record: Path, **kind: object) -> None:
    """As if another machine had been copied. The next daemon reads it."""
    data = world.machine.files.file(record).data
    said = json.loads(bytes(data))
    said["kind"].update(kind)
    data[:] = json.dumps(said).encode()


async def start_again(world: World) -> None:
    await world.stop_daemon()
    await world.start_daemon()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ({"version": "10.1.0"}, "this host has an older one, 10.0.13"),
        ({"version": "2.12.1", "machine": "pc-q35-2.12"}, "no longer has its machine type pc-q35-2.12"),
        ({"devices": 99}, "its devices have format 99"),
        ({"accelerator": "kvm", "machine": "microvm"}, "it was made under KVM"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused_until_it_fits(
    tmp_path: Path, kind: dict[str, object], why: str
) -> None:
    async def story(world: World) -> None:
        record = await snapshot(world) / "checkpoint.json"
        before = bytes(world.machine.files.file(record).data)
        rewrite(world, record, **kind)
        await start_again(world)
        vm = await restore(world, "no")
        assert (vm["status"], vm["reason"]["code"]) == ("crashed", "checkpoint_unfit")
        assert why in vm["reason"]["message"]
        world.machine.files.file(record).data[:] = before
        await start_again(world)
        assert (await restore(world, "yes"))["status"] == "running"

    run(tmp_path, story)


def test_a_snapshot_of_an_older_qemu_is_restored(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        rewrite(world, await snapshot(world) / "checkpoint.json", version="9.2.4", machine="pc-q35-9.2")
        await start_again(world)
        assert (await restore(world, "copy"))["status"] == "running"

    run(tmp_path, story)


@pytest.mark.parametrize(
    ("name", "why"),
    [("memory", "its memory was changed"), ("state", "its state was changed"), ("checkpoint.json", "is damaged")],
)
def test_a_changed_file_is_refused(tmp_path: Path, name: str, why: str) -> None:
    async def story(world: World) -> None:
        directory = await snapshot(world)
        node = world.machine.files.file(directory / name)
        node.data[:] = b"X" + node.data[1:]
        vm = await restore(world, "no")
        assert (vm["status"], vm["reason"]["code"]) == ("crashed", "checkpoint_damaged")
        assert why in vm["reason"]["message"]

    run(tmp_path, story)


def test_a_record_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        record = world.machine.files.file(await snapshot(world) / "checkpoint.json").data
        record[:] = re.sub(rb'("state_sha256": ?").', b"\\1\xff", bytes(record))
        vm = await restore(world, "no")
        assert (vm["status"], vm["reason"]["code"]) == ("crashed", "checkpoint_damaged")

    run(tmp_path, story)


def test_a_changed_state_is_refused_even_with_unchanged_times(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        directory = await snapshot(world)
        files = world.machine.files
        files.file(directory / "state").data[-1:] = b" "
        record = files.file(directory / "checkpoint.json").data
        said = json.loads(bytes(record))
        said["fingerprints"]["state"] = world.daemon.host.files.fingerprint(directory / "state")
        record[:] = json.dumps(said).encode()
        vm = await restore(world, "no")
        assert (vm["status"], vm["reason"]["code"]) == ("crashed", "checkpoint_damaged")
        assert "its state has other bytes" in vm["reason"]["message"]

    run(tmp_path, story)


def test_missing_files_are_reported(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.machine.files.remove_tree(await snapshot(world))
        vm = await restore(world, "no")
        assert (vm["status"], vm["reason"]["code"]) == ("crashed", "checkpoint_gone")

    run(tmp_path, story)


@pytest.mark.parametrize("kind", ["snapshots", "fork"])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "demo/stop?grace=9s", "stopped"),
        ("POST", "demo/restart?grace=9s", "running"),
        ("POST", "demo/pause", "paused"),
        ("DELETE", "demo", None),
    ],
)
def test_a_command_cancels_a_running_copy_and_nothing_is_left_of_it(
    tmp_path: Path, kind: str, method: str, path: str, status: str | None
) -> None:
    async def story(world: World) -> None:
        [qemu] = world.machine.running()
        # Else it would be copied in no time.
        qemu.deaf_to.add("xen-save-devices-state")
        answers = []

        async def copy() -> None:
            body = {"name": "warm"} if kind == "snapshots" else {"names": ["twin"]}
            answers.append(await world.request("POST", f"{VMS}/demo/{kind}", body, JSON))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy)
            await stands_still(qemu)
            assert world.daemon.vms.copies.inspect()
            nursery.start_soon(world.request, method, f"{VMS}/{path}")
            await trio.sleep(1)
            assert not world.daemon.vms.copies.inspect()
            assert (qemu.status == "paused") == (status == "paused"), "the guest can be asked to end"
        if status is not None:
            vm = (await world.request("GET", f"{VMS}/demo?wait={status}&timeout=2m")).json()
            assert (vm["status"], vm["reason"]) == (status, None)
        [refused] = answers
        assert refused.status == 503, refused.body
        assert (await world.request("GET", f"{VMS}/twin")).status == 404
        assert not world.daemon.store.projection.snapshots
        assert not copies(world)

    run(tmp_path, story)


def test_a_copy_that_a_pause_cancelled_can_be_made_afterwards(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        [qemu] = world.machine.running()
        qemu.deaf_to.add("xen-save-devices-state")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.request, "POST", f"{VMS}/demo/snapshots", {"name": "warm"}, JSON)
            await stands_still(qemu)
            assert (await world.request("POST", f"{VMS}/demo/pause?wait=paused")).json()["status"] == "paused"
        qemu.deaf_to.clear()
        assert (await world.request("POST", f"{VMS}/demo/resume?wait=running")).json()["status"] == "running"
        assert qemu.status == "running"
        assert await snapshot(world) / "memory" in copies(world)
        assert (await restore(world, "copy"))["status"] == "running"

    run(tmp_path, story)


def test_a_snapshot_that_a_killed_daemon_began_can_be_taken_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        [qemu] = world.machine.running()
        qemu.deaf_to.add("xen-save-devices-state")
        once = {**JSON, "idempotency-key": "once"}

        async def take() -> Answer:
            return await world.request("POST", f"{VMS}/demo/snapshots", {"name": "warm"}, once)

        async def take_in_vain() -> None:
            with pytest.raises(Unreachable):
                await take()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_in_vain)
            await stands_still(qemu)
            await world.kill_daemon()
        qemu.deaf_to.clear()
        # What is left of it can't be removed at first.
        world.machine.disk_full = True
        await world.start_daemon()
        await trio.sleep(0.5)
        world.machine.disk_full = False
        statuses = []
        with trio.fail_after(30):
            while (answer := await take()).status != 201:
                statuses.append(answer.status)
                await trio.sleep(0.1)
        assert set(statuses) <= {503}, "a refusal that is kept for the key"

    run(tmp_path, story)


def test_a_snapshot_has_the_volumes_as_they_were_and_each_restored_vm_copies_of_its_own(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        def file_of(name: str) -> str:
            [volume] = [each for each in world.daemon.store.projection.volumes.values() if each.name == name]
            return f"{volume.id}.img"

        def content(name: str) -> bytearray:
            return files(world)[file_of(name)].data

        async def make(name: str) -> None:
            assert (await world.request("POST", VOLUMES, {"name": name, "size_mb": 64}, JSON)).status == 201

        await make("data")
        await make("more")
        body = {"name": "demo", "cpu_cores": 1, "memory_mb": 64, "volumes": ["data:/d", "more:/m"]}
        assert (await world.request("POST", f"{VMS}?wait=running", body, JSON)).json()["status"] == "running"
        content("data")[:] = b"ext4 first"
        refused = await world.request("POST", f"{VMS}/demo/snapshots", {"name": "warm"}, JSON)
        assert (refused.status, refused.json()["type"].rpartition(":")[2]) == (409, "volume-written")
        taken = await world.request("POST", f"{VMS}/demo/snapshots", {"name": "warm", "volumes": True}, JSON)
        assert (taken.status, taken.json()["volumes"]) == (201, ["data", "more"]), taken.body
        content("data")[:] = b"ext4 second"

        for name in ("one", "two"):
            vm = await restore(world, name)
            assert (vm["status"], vm["booted_from"]) == ("running", "snapshot")
            assert vm["volumes"] == [f"{name}-data:/d", f"{name}-more:/m"]
            assert content(f"{name}-data") == b"ext4 first"
            content(f"{name}-data")[:] = f"ext4 {name}".encode()
        assert content("data") == b"ext4 second"
        assert content("one-data") == b"ext4 one"

        # Where the second volume can't be copied, nothing is left of the first.
        await make("three-more")
        [copy] = [path for path in copies(world) if path.name == file_of("more")]
        for name, status, why in (("three", 409, "three-more"), ("four", 503, copy.name)):
            if status == 503:
                world.machine.files.unlink(copy)
            refused = await world.request("POST", VMS, {"name": name, "from_snapshot": "warm"}, JSON)
            assert (refused.status, why in refused.json()["detail"]) == (status, True), refused.body
            assert (await world.request("GET", f"{VMS}/{name}")).status == 404
            kept = {"data", "more", "one-data", "one-more", "two-data", "two-more", "three-more"}
            assert set(await settled(world)) == kept
        assert (await world.request("DELETE", "/api/v1/snapshots/warm")).status == 204
        assert not copies(world)

    run_story(tmp_path, story, seed=11)
