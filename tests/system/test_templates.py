"""The second VM of a kind is a clone: fast, with its own identity, and never worse than a cold boot."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, kept, run, until
from volant.client import Client

# These tests build their own templates, and damage them.
pytestmark = pytest.mark.cold

T = TypeVar("T")
CLOCK_S = 0.05
WHO = """
import json, os, time
print(json.dumps({
    "urandom": os.urandom(16).hex(),
    "machine_id": open("/etc/machine-id").read().strip(),
    "boot_id": open("/proc/sys/kernel/random/boot_id").read().strip(),
    "hostname": os.uname().nodename,
    "clone": json.load(open("/run/volant-clone.json")),
    "time": time.time(),
}))
"""
FREES = """
import time
x = bytearray(b"x") * (12 << 20)
del x
for what, how in (("drop_caches", "3"), ("compact_memory", "1")):
    with open(f"/proc/sys/vm/{what}", "w") as handle:
        handle.write(how)
time.sleep(3)
"""


@pytest.fixture(scope="module")
def templates(image_cache: Path, _running: list[Daemon]) -> Iterator[Daemon]:
    """A daemon in which the kind of VM that the tests make has a template."""

    async def prepare(daemon: Daemon) -> None:
        async with daemon.client() as client:
            vm = await boot(client, "first")
            assert (vm.booted_from, vm.boot, vm.fallback) == ("cold", "auto", None)
            await template(daemon)

    with kept(Daemon(image_cache, "--templates", "auto"), _running) as daemon:
        trio.run(prepare, daemon)
        yield daemon


@pytest.fixture
def daemon(templates: Daemon) -> Iterator[Daemon]:
    yield templates
    templates.delete_vms()
    assert templates.hypervisors() == {}
    assert templates.files() == []


async def eventually(look: Callable[[], T], timeout_s: float = BOOT_S) -> T:
    """What `look` finds, once it finds something: in another process, which offers no wait."""
    with trio.fail_after(timeout_s):
        while not (found := look()):  # noqa: ASYNC110
            await trio.sleep(0.02)
    return found


async def template(daemon: Daemon) -> Path:
    """Waits for a template; returns the directory of the newest one."""
    found = await eventually(
        lambda: [p.parent for p in daemon.state_dir.glob("templates/*/template.json") if not p.parent.suffix]
    )
    return max(found, key=lambda path: path.stat().st_mtime)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def who(client: Client, name: str) -> dict[str, Any]:
    """Returns the identity of a guest, once its clock is right: on a busy host it is corrected later."""
    said: list[tuple[float, float, float]] = []
    with trio.move_on_after(BOOT_S):
        while True:
            before = time.time()
            found: dict[str, Any] = json.loads(await run(client, name, "python3.13", "-c", WHO))
            after = time.time()
            if before - CLOCK_S <= found["time"] <= after + CLOCK_S:
                return found
            said.append((before, found["time"], after))
            await trio.sleep(0.5)
    raise AssertionError(f"the clock of {name} is never right: {said}")


async def test_clones_have_an_identity_each(daemon: Daemon) -> None:
    async with daemon.client() as client:
        names = [f"clone{number}" for number in range(5)]
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            vm = await boot(client, name)
            assert (vm.booted_from, vm.fallback) == ("template", None)
            found[name] = await who(client, name)
            info = await client.vms.agent_info(name)
            assert info["instance_id"] == found[name]["clone"]["instance_id"]
            assert info["hostname"] == found[name]["hostname"] == found[name]["clone"]["hostname"] == name
            assert found[name]["clone"]["vm_id"] == vm.id
            assert found[name]["clone"]["machine_id"] == found[name]["machine_id"]
        for what in ("urandom", "machine_id", "boot_id", "hostname"):
            assert len({each[what] for each in found.values()}) == len(names), what
        # A write in one is not visible in others.
        await run(client, "clone0", "touch", "/root/mine")
        assert "mine" not in await run(client, "clone1", "ls", "-a", "/root")
        # After a restart, a VM without a disk is a clone again, with the same machine id.
        await client.vms.restart("clone1")
        restarted = await until(client, "clone1", "running")
        assert restarted is not None
        assert (restarted.booted_from, restarted.boots) == ("template", 2)
        again = await who(client, "clone1")
        assert again["machine_id"] == found["clone1"]["machine_id"]
        assert again["boot_id"] != found["clone1"]["boot_id"]


async def test_a_clone_cannot_change_the_memory_of_its_template(daemon: Daemon) -> None:
    memory = (await template(daemon)) / "memory"
    before, room = digest_of(memory), memory.stat().st_blocks
    async with daemon.client() as client:
        assert (await boot(client, "clone")).booted_from == "template"
        # No device through which root in the guest could return memory.
        found = await run(client, "clone", "sh", "-c", "cat /sys/bus/virtio/devices/*/device")
        assert "0x0005" not in found.split(), "it has a balloon"
        await run(client, "clone", "python3.13", "-c", FREES)
        taken = await client.vms.memory("clone")
        assert taken.guest is not None
        assert taken.host.private_mb > 12, "what it wrote is its own"
    assert (digest_of(memory), memory.stat().st_blocks) == (before, room)


def touch(directory: Path) -> None:
    os.utime(directory / "memory")
