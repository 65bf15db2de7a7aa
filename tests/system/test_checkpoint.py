"""A busy guest is copied while it runs: it loses no byte and no stream, and each copy gets an identity of its own.

Without a daemon: this tests guest, hypervisor and channel.
"""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.hypervisor.kit import guest_spec
from volant.channel import AgentClient, Channel, VirtioSerial, open_channel
from volant.host import Host
from volant.hypervisor import Checkpoint, Machine, MachineSpec
from volant.hypervisor.qemu import QemuHypervisor
from volant.model.agent import DAEMON_IDENTITY, EXEC, HEALTHZ, INFO

BOOT_S = 120.0
JSON = [(b"content-type", b"application/json")]

CHATTER = """
import time
for number in range(10**9):
    print(number, "x" * (number * 37 % 900), flush=True)
    if number % 50 == 0:
        time.sleep(0.02)
"""
FLOOD = "import sys; [sys.stdout.write('y' * 2**20) for _ in range(10**9)]"
Unread = Callable[[], tuple[int, int]]
WHO_RUNS = """
import glob, time
def left_over():
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            command = open(path, "rb").read()
        except OSError:
            continue
        if b"number * 37" in command or b"'y' *" in command:
            yield command
ends_at = time.monotonic() + 20
while list(left_over()) and time.monotonic() < ends_at:
    time.sleep(0.05)
for command in left_over():
    print("left over", command)
"""


@pytest.fixture
def spec(host: Host, image_cache: Path, tmp_path: Path) -> MachineSpec:
    return guest_spec(host, image_cache, tmp_path / "vm", name="origin", memory_mb=160)


class Guest:
    """A running guest and the channel to its agent."""

    def __init__(self, host: Host, qemu: QemuHypervisor, spec: MachineSpec, machine: Machine, channel: Channel) -> None:
        self.spec = spec
        self.channel = channel
        self.client = AgentClient(channel)
        self._host = host
        self._qemu = qemu
        self._machine = machine

    async def copy(self) -> Checkpoint:
        into = self.spec.memory_file.parent / f"copy-{self._host.random.new_id()}"
        await self._host.files.mkdir(into)
        checkpoint = await self._machine.checkpoint(into, hold=self.channel.hold)
        print(f"paused for {checkpoint.paused_s * 1000:.0f} ms; {checkpoint.memory_bytes // 2**20} MiB of memory")
        return checkpoint

    @asynccontextmanager
    async def fork(self, name: str) -> AsyncIterator[Guest]:
        """Starts a copy and assigns its identity; then its files are unlinked."""
        checkpoint = await self.copy()
        spec = msgspec.structs.replace(
            self.spec,
            name=name,
            directory=self.spec.directory.with_name(name),
            memory_file=self.spec.memory_file.with_name(f"{name}.mem"),
            tag=f"{self.spec.tag}-{name}",
            template=checkpoint.template,
        )
        async with running(self._host, self._qemu, spec) as other:
            await self._host.files.remove_tree(checkpoint.template.memory.parent)
            await other.become(name)
            yield other

    async def ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        answer = await self.client.request_json(method, path, body, timeout_s=30)
        assert 200 <= answer.status < 300, answer
        return answer.body or {}

    async def become(self, name: str) -> None:
        identity = {
            "hostname": name,
            "machine_id": self._host.random.new_id(),
            "vm_id": 7,
            "entropy": base64.b64encode(self._host.random.token_bytes(64)).decode(),
            "time_ns": time.time_ns(),
        }
        await self.ask("PUT", DAEMON_IDENTITY, identity)

    async def run(self, *command: str) -> bytes:
        """Returns the stdout of a command."""
        lines = [line async for line in self.output(*command)]
        return b"".join(lines)

    async def output(self, *command: str) -> AsyncIterator[bytes]:
        body, text = msgspec.json.encode({"command": command}), b""
        async with self.client.stream("POST", EXEC, JSON, body, timeout_s=30) as response:
            assert response.status == 200
            async for piece in response:
                *lines, text = (text + piece).split(b"\n")
                for line in lines:
                    said = msgspec.json.decode(line)
                    if said.get("stream") == "stdout":
                        yield base64.b64decode(said["data"])


@asynccontextmanager
async def running(host: Host, qemu: QemuHypervisor, spec: MachineSpec) -> AsyncIterator[Guest]:
    async with qemu.attach(spec, await qemu.launch(spec)) as machine:
        async with open_channel(host, VirtioSerial(spec.agent_path)) as channel:
            guest = Guest(host, qemu, spec, machine, channel)
            with trio.fail_after(BOOT_S):
                await channel.ready()
            await guest.ask("GET", HEALTHZ)
            yield guest
        await machine.kill()


class Traffic:
    """Keeps a guest busy with streams, and checks each byte that arrives."""

    def __init__(self, guest: Guest) -> None:
        self.lines = 0
        self.flooded = 0
        self._guest = guest

    async def chatter(self) -> None:
        text = b""
        async for data in self._guest.output("python3.13", "-c", CHATTER):
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                assert line == b"%d %s" % (self.lines, b"x" * (self.lines * 37 % 900))
                self.lines += 1
        raise AssertionError("the chatter has ended")

    async def flood(self) -> None:
        async for data in self._guest.output("python3.13", "-c", FLOOD):
            assert not data.strip(b"y")
            self.flooded += len(data)
        raise AssertionError("the flood has ended")


async def test_a_guest_whose_port_is_full_can_be_copied(host: Host, qemu: QemuHypervisor, spec: MachineSpec) -> None:
    with trio.fail_after(2 * BOOT_S):
        async with running(host, qemu, spec) as guest, trio.open_nursery() as nursery:
            traffic = Traffic(guest)
            nursery.start_soon(traffic.chatter)
            for _ in range(6):
                nursery.start_soon(traffic.flood)
            while traffic.flooded < 2**20:  # noqa: ASYNC110
                await trio.sleep(0.01)
            guest.channel.hold = partial(filled, guest.channel.hold)  # type: ignore[method-assign]
            async with guest.fork("copy") as copy:
                assert (await copy.ask("GET", INFO))["hostname"] == "copy"
                # The streams of the original end in the copy, and block nothing.
                assert await copy.run("python3.13", "-c", WHO_RUNS) == b""
            lines = traffic.lines
            while traffic.lines < lines + 20:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert guest.channel.statistics().links == 1
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def filled(hold: Callable[[], AbstractAsyncContextManager[Unread]]) -> AsyncIterator[Unread]:
    """Holds a channel until the guest has filled its port."""
    async with hold() as unread:
        seen: list[int] = []
        while len(seen) < 10 or len(set(seen[-10:])) > 1:
            seen.append(unread()[1])
            await trio.sleep(0.1)
        assert seen[-1] > 0
        yield unread
