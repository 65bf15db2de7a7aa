"""Memory that a guest frees returns to the host if the guest owns it; a shared file never loses pages."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from tests.hypervisor.kit import guest_spec, real_qemu
from tests.system.kit import BOOT_S, Daemon, boot, run
from volant.channel import AgentClient, AgentUnreachable, VirtioSerial, open_channel
from volant.host import Host
from volant.hypervisor import MachineSpec, Template
from volant.hypervisor.qemu import QemuHypervisor

pytestmark = pytest.mark.cold

MEMORY_MB = 320
TAKEN_MB = 150
FILL = f"""
import os, time
x = bytearray(b"x") * ({TAKEN_MB} << 20)
open("/run/filled", "w").close()
while not os.path.exists("/run/measured"):
    time.sleep(0.05)
"""
RETURN_S = 60.0
"""Most memory returns within two seconds, the rest within a minute."""
HOSTILE = """
import os, time
balloon = "/sys/bus/virtio/drivers/virtio_balloon"
paths = os.listdir("/sys/bus/virtio/devices")
[device] = [name for name in paths if int(open(f"/sys/bus/virtio/devices/{name}/device").read(), 16) == 5]
if not os.path.exists(f"{balloon}/{device}"):
    open(f"{balloon}/bind", "w").write(device)
open("/sys/module/page_reporting/parameters/page_reporting_order", "w").write("0")
for _ in range(2):
    x = bytearray(b"x") * (50 << 20)
    del x
    time.sleep(3)
"""


@pytest.fixture
async def vm(module_daemon: Daemon, daemon: Daemon) -> Path:
    """The memory file of a VM that booted cold; the tests of this module share it."""
    async with daemon.client() as client:
        if "vm" not in daemon.kept:
            await boot(client, "vm", memory_mb=MEMORY_MB)
            daemon.kept.add("vm")
    [file] = module_daemon.memory_dir.glob("*.mem")
    return file


def taken_mb(file: Path) -> float:
    return file.stat().st_blocks / 2048


async def at_most(file: Path, limit_mb: float) -> None:
    """Waits until a file takes at most this much."""
    with trio.fail_after(RETURN_S):
        while taken_mb(file) > limit_mb:  # noqa: ASYNC110
            await trio.sleep(0.1)


async def test_freed_memory_of_a_guest_returns_to_the_host(daemon: Daemon, vm: Path) -> None:
    async with daemon.client() as client:
        # Memory that is unused since its boot has already returned.
        await at_most(vm, MEMORY_MB - 100)
        before = await client.vms.memory("vm")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, client, "vm", "python3.13", "-c", FILL)
            await run(client, "vm", "sh", "-c", "until test -e /run/filled; do sleep 0.05; done")
            full, full_mb = await client.vms.memory("vm"), taken_mb(vm)
            await run(client, "vm", "touch", "/run/measured")
        await at_most(vm, full_mb - 100)
        after = await client.vms.memory("vm")
    for found in (before, full, after):
        assert found.memory_mb == MEMORY_MB
        assert found.guest is not None
        assert MEMORY_MB - 80 < found.guest.total_mb < MEMORY_MB
        assert 0 < found.guest.available_mb < found.guest.total_mb
        host = found.host
        assert 0 < host.private_mb <= host.pss_mb <= host.rss_mb < MEMORY_MB + 512
        assert abs(host.private_mb + host.shared_mb - host.rss_mb) < 1
    assert after.host.pss_mb < full.host.pss_mb - 50


@asynccontextmanager
async def machines(image_cache: Path, tmp_path: Path) -> AsyncIterator[tuple[Host, QemuHypervisor, MachineSpec]]:
    """Gives a hypervisor and the spec of a machine with a balloon, and removes everything afterwards."""
    host = Host()
    spec = guest_spec(host, image_cache, tmp_path / "origin", name="origin", memory_mb=192, balloon=True)
    async with real_qemu(host, spec, tmp_path / "cache") as qemu:
        yield host, qemu, spec


async def tell(client: AgentClient, *command: str) -> None:
    """Runs a command in a guest without a daemon; it must succeed."""
    body = json.dumps({"command": command}).encode()
    headers = [(b"content-type", b"application/json")]
    async with client.stream("POST", "/v1/exec", headers, body, timeout_s=60) as answer:
        said = [json.loads(line) for line in (await answer.read(2**20)).splitlines()]
    assert said[-1] == {"exit_code": 0}, [base64.b64decode(one.get("data", "")) for one in said]


async def with_agent(host: Host, spec: MachineSpec, use: Callable[[AgentClient], Awaitable[None]]) -> None:
    with trio.fail_after(BOOT_S):
        async with open_channel(host, VirtioSerial(spec.agent_path)) as channel:
            client = AgentClient(channel)
            while True:
                try:
                    await client.request_json("GET", "/healthz", timeout_s=BOOT_S)
                    break
                except AgentUnreachable:
                    await trio.sleep(0.1)
            await use(client)


@pytest.mark.full
async def test_a_copy_that_returns_shared_memory_changes_nothing(image_cache: Path, tmp_path: Path) -> None:
    """A copy of a guest with a balloon has one, too, and root in the guest controls it."""

    async def settle(client: AgentClient) -> None:
        # The driver is loaded last, after the agent answers.
        await tell(client, "sh", "-c", "until ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio*; do sleep 0.1; done")

    async def attack(client: AgentClient) -> None:
        await tell(client, "python3.13", "-c", HOSTILE)

    async with machines(image_cache, tmp_path) as (host, qemu, spec):
        identity = await qemu.launch(spec)
        await with_agent(host, spec, settle)
        async with qemu.attach(spec, identity) as machine:
            await machine.save(tmp_path / "state")
            await machine.quit()
        before = hashlib.sha256(spec.memory_file.read_bytes()).hexdigest()
        copy = msgspec.structs.replace(
            spec,
            directory=tmp_path / "copy",
            tag=f"{spec.tag}-2",
            template=Template(spec.memory_file, tmp_path / "state"),
        )
        await qemu.launch(copy)
        await with_agent(host, copy, attack)
        assert hashlib.sha256(spec.memory_file.read_bytes()).hexdigest() == before
        assert "Discarding RAM with readonly files is not supported" in copy.log_path.read_text(), "it has not tried"
