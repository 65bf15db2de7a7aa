"""PID 1 and the agent in a real guest with the least memory that the image allows."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from volant import images
from volant.channel import AgentClient, VirtioSerial, open_channel
from volant.host import Host
from volant.model import agent as wire

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86"),
]

BOOT_S = 60.0


@pytest.fixture(scope="session")
def image(image_cache: Path) -> images.Image:
    return images.build(image_cache)


class Guest:
    def __init__(self, process: subprocess.Popen[bytes], client: AgentClient, console: Path) -> None:
        self.process = process
        self.client = client
        self.console = console

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        answer = await self.client.request_json(method, path, body, timeout_s=BOOT_S)
        assert answer.status in (200, 202), answer
        return answer.body

    async def run(self, *command: str, **fields: object) -> tuple[bytes, Any]:
        """Runs a command; returns its standard output and how it ended."""
        text = bytearray()
        body = msgspec.json.encode({"command": command, **fields})
        with trio.fail_after(120):
            async with self.client.stream("POST", wire.EXEC, body=body, timeout_s=BOOT_S) as response:
                assert response.status == 200
                async for piece in response:
                    text += piece
        lines = [json.loads(line) for line in bytes(text).splitlines()]
        output = b"".join(base64.b64decode(line["data"]) for line in lines if line.get("stream") == "stdout")
        return output, lines[-1]

    async def ended(self) -> int:
        with trio.fail_after(BOOT_S):
            return await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


@asynccontextmanager
async def boot(image: images.Image, folder: Path, *parameters: str) -> AsyncIterator[Guest]:
    console, path = folder / "console", folder / "agent.sock"
    append = ("console=ttyS0", "quiet", "panic=-1", *image.kernel_parameters, *parameters)
    command = [
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", str(image.min_memory_mb)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", " ".join(append)),
        *("-serial", f"file:{console}", "-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,path={path},server=on,wait=off"),
        *("-device", f"virtserialport,chardev=agent,name={wire.SERIAL_PORT_NAME}"),
        *("-device", "pvpanic-pci", "-device", "virtio-rng-pci"),
    ]
    process = await trio.to_thread.run_sync(_start, command)
    try:
        async with open_channel(Host(), VirtioSerial(path)) as channel:
            yield Guest(process, AgentClient(channel), console)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's folders are too long for the path of a Unix socket.
    path = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    yield path
    shutil.rmtree(path)


async def test_a_guest_reports_itself_and_shuts_down(image: images.Image, folder: Path) -> None:
    parameters = ("volant.hostname=demo", "PYTHONHOME=/nonexistent", "sysctl.vm.compaction_proactiveness=5")
    async with boot(image, folder, *parameters) as guest:
        health = await guest.ask("GET", wire.HEALTHZ)
        assert (health["status"], health["workload"]["state"]) == ("ok", "none")
        info = await guest.ask("GET", wire.INFO)
        assert info["hostname"] == "demo"
        assert info["memory"]["total_mb"] < image.min_memory_mb

        output, end = await guest.run("sh", "-c", "cat /proc/mounts; ls /dev/pts /dev/shm; ping -c 1 127.0.0.1")
        assert end == {"exit_code": 0}
        mounts = {line.split()[1] for line in output.decode().splitlines() if line.count(" ") == 5}
        assert mounts >= {"/proc", "/sys", "/dev", "/run", "/tmp", "/dev/pts", "/dev/shm"}

        # A command blocks no signal, and the kernel would kill it before the agent.
        output, _ = await guest.run("sh", "-c", "grep SigBlk /proc/self/status; cat /proc/self/oom_score_adj")
        assert output.decode().split() == ["SigBlk:", "0000000000000000", "0"]

        output, end = await guest.run("python3", "-c", "import json, sys; print(json.dumps(sys.version_info[:2]))")
        assert (output, end) == (b"[3, 13]\n", {"exit_code": 0})

        # Timers that would wake an idle guest are off, except for what the kernel's command line sets.
        names = ("kernel/soft_watchdog", "vm/compaction_proactiveness", "vm/stat_interval")
        reserved = "/sys/kernel/debug/sched/fair_server/cpu0/runtime"
        output, _ = await guest.run("cat", *(f"/proc/sys/{name}" for name in names), reserved)
        assert output.split() == [b"0", b"5", b"60", b"0"]

        # PID 1 reaps orphans.
        await guest.run("sh", "-c", "for i in 1 2 3 4 5; do sh -c 'sleep 0.1 & ' & done; wait")
        output, _ = await guest.run("sh", "-c", "sleep 1; ps -o stat | grep -c Z")
        assert output == b"0\n"

        script = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done"
        await guest.ask("PUT", wire.DAEMON_WORKLOAD, {"entrypoint": ["sh", "-c", script], "restart": "always"})
        heard = bytearray()
        ready = trio.Event()

        async def listen() -> None:
            decoder = wire.LogDecoder()
            async with guest.client.stream("GET", wire.DAEMON_LOGS, timeout_s=BOOT_S) as response:
                async for piece in response:
                    for kind, _, _, data in decoder.feed(piece):
                        if kind == wire.FRAME_STDOUT:
                            heard.extend(data)
                            ready.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            with trio.fail_after(BOOT_S):
                await ready.wait()
            # It ignores SIGTERM, and is killed after the grace.
            await guest.run("sh", "-c", "(trap '' TERM; while :; do sleep 0.1; done) </dev/null >/dev/null 2>&1 &")
            await guest.ask("POST", wire.DAEMON_SHUTDOWN, {"grace_s": 5})
            with trio.fail_after(BOOT_S):
                assert await guest.ended() == 0
        assert bytes(heard) == b"up\nbye\n"
    said = guest.console.read_text()
    assert "some processes did not end when they were asked to" in said
    assert "Power down" in said
    assert "panic" not in said
