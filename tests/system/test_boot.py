"""A real guest without a daemon is launched, reached and adopted after `kill -9`, and its end is reported."""

from __future__ import annotations

import hashlib
import os
import sys
from base64 import b64decode
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from tests.hypervisor.kit import guest_spec
from volant.channel import AgentClient, VirtioSerial, open_channel
from volant.host import Host
from volant.hypervisor import MachineSpec
from volant.hypervisor.qemu import QemuHypervisor
from volant.model import EndKind
from volant.model.agent import DAEMON_SHUTDOWN, EXEC, HEALTHZ, INFO

BOOT_S = 120.0


@pytest.fixture
def spec(host: Host, image_cache: Path, tmp_path: Path) -> MachineSpec:
    return guest_spec(host, image_cache, tmp_path / "vm", name="boot", memory_mb=128, cmdline="")


async def run(client: AgentClient, *command: str) -> tuple[bytes, int]:
    """Returns stdout and exit status of a command in the guest."""
    body = msgspec.json.encode({"command": command})
    output = bytearray()
    text = b""
    last: dict[str, object] = {}
    async with client.stream("POST", EXEC, [(b"content-type", b"application/json")], body, timeout_s=30) as response:
        assert response.status == 200
        async for piece in response:
            *lines, text = (text + piece).split(b"\n")
            for line in lines:
                last = msgspec.json.decode(line)
                if last.get("stream") == "stdout":
                    output += b64decode(str(last["data"]))
    exit_code = last.get("exit_code", last.get("signal"))
    assert isinstance(exit_code, int), last
    return bytes(output), exit_code


@pytest.mark.full
async def test_a_guest_boots_while_qemu_gets_no_turn(host: Host, qemu: QemuHypervisor, spec: MachineSpec) -> None:
    """QEMU's main thread raises the interrupts of the guest's first timer. When they came late, the kernel panicked:
    'IO-APIC + timer doesn't work'."""
    identity = await qemu.launch(spec)
    cpu = min(os.sched_getaffinity(0))
    async with qemu.attach(spec, identity) as machine, open_channel(host, VirtioSerial(spec.agent_path)) as channel:
        # Only this thread, not those of the virtual processors.
        os.sched_setaffinity(identity.pid, {cpu})
        os.sched_setscheduler(identity.pid, os.SCHED_IDLE, os.sched_param(0))
        hog = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"]
        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(trio.run_process, hog))
                raise AssertionError(await machine.ended())
        await AgentClient(channel).request_json("GET", HEALTHZ, timeout_s=BOOT_S)
        await machine.kill()


async def test_a_guest_is_reached_and_shuts_down_when_asked(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec
) -> None:
    began = host.clock.monotonic()
    identity = await qemu.launch(spec)
    async with qemu.attach(spec, identity) as machine, open_channel(host, VirtioSerial(spec.agent_path)) as channel:
        client = AgentClient(channel)
        healthz = await client.request_json("GET", HEALTHZ, timeout_s=BOOT_S)
        print(f"spawn to agent: {host.clock.monotonic() - began:.2f} s")
        assert (healthz.status, healthz.body["status"]) == (200, "ok")
        info = await client.request_json("GET", INFO, timeout_s=30)
        assert info.body["hostname"] == "boot"

        with trio.fail_after(120):
            assert await run(client, "sh", "-c", "echo out; echo err >&2; exit 3") == (b"out\n", 3)
            data, _ = await run(client, "sh", "-c", "head -c 3000000 /dev/zero")
            assert data == bytes(3_000_000)
            await connects_to_loopback(client)
            await console_loses_nothing(host, client, spec)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_to_shut_down, client)
                assert (await machine.ended()).kind is EndKind.SHUTDOWN
                # The guest may be gone before its answer is out.
                nursery.cancel_scope.cancel()
            assert await machine.status() == "shutdown"
            assert (await machine.quit()).exit_status == 0


async def ask_to_shut_down(client: AgentClient) -> None:
    answer = await client.request_json("POST", DAEMON_SHUTDOWN, {"grace_s": 5}, timeout_s=120)
    assert answer.status == 202


async def connects_to_loopback(client: AgentClient) -> None:
    """Sends raw bytes to a server on the guest's loopback, with a half close."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, client, "timeout", "20", "nc", "-l", "-p", "7000", "-e", "sha256sum")
        data = os.urandom(300_000)
        while True:
            async with client.stream("CONNECT", "127.0.0.1:7000", timeout_s=10) as response:
                if not response.switched:
                    await trio.sleep(0.1)  # the server does not listen yet
                    continue
                raw = response.upgraded()
                await raw.send_all(data)
                await raw.send_eof()
                answer = b""
                while piece := await raw.receive_some():
                    answer += piece
                break
    assert answer.split()[0].decode() == hashlib.sha256(data).hexdigest()


async def console_loses_nothing(host: Host, client: AgentClient, spec: MachineSpec) -> None:
    before = host.files.size(spec.console_path)
    await run(client, "sh", "-c", "seq 1 8000 > /dev/console; echo end > /dev/console")
    with host.watches.open(spec.console_path) as watch:
        while not (text := (await host.files.read(spec.console_path))[before:]).rstrip().endswith(b"end"):
            await watch.wait()
    numbers = [line for line in text.split() if line.isdigit()]
    assert numbers == [b"%d" % n for n in range(1, 8001)]
