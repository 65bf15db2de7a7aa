"""`volar run` in the foreground: the program is the VM's workload, and volar is attached to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.oci.kit import write_layout
from tests.oci.registry import needs_registry
from tests.system.kit import Daemon, until
from tests.system.rootfs import busybox_layer
from tests.system.test_standby import filled
from volant.client import Client, LogLine
from volant.model import Event

pytestmark = needs_registry

RUN_S = 120.0


@pytest.fixture(scope="module")
def image(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    layer = busybox_layer(image_cache, ("etc", {}), ("etc/passwd", {"data": b"root:x:0:0::/root:/bin/sh\n"}))
    built = write_layout(
        tmp_path_factory.mktemp("oci") / "layout", [layer], Env=["PATH=/bin"], Cmd=["sh"],
        Healthcheck={"Test": ["CMD", "cat", "/ready"]},
    )  # fmt: skip
    return f"oci:{built.layout}:t"


@asynccontextmanager
async def volar(daemon: Daemon, *words: str) -> AsyncIterator[trio.Process]:
    """`volar run` while the block runs."""
    environ = {**os.environ, "VOLANT_API_BASE": daemon.base_url}
    command = [sys.executable, "-m", "volant.cli.main", "run", *words]
    async with trio.open_nursery() as nursery:
        start = partial(
            trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            check=False, env=environ,
        )  # fmt: skip
        process: trio.Process = await nursery.start(start)
        try:
            with trio.fail_after(RUN_S):
                yield process
        finally:
            if process.returncode is None:
                process.kill()


async def shown(process: trio.Process, text: bytes) -> None:
    """Waits until volar has passed this on."""
    assert process.stdout is not None
    seen = b""
    while text not in seen:
        piece = await process.stdout.receive_some()
        assert piece, (seen, process.stderr and await process.stderr.receive_some())
        seen += piece


async def send(process: trio.Process, data: bytes) -> None:
    assert process.stdin is not None
    await process.stdin.send_all(data)


async def log_of(client: Client, name: str) -> list[str]:
    """What the program has written."""
    async with client.vms.logs(name, since=0, streams=["stdout", "stderr"], follow=False) as log:
        lines = [line.line async for line in log if isinstance(line, LogLine)]
    return [line for line in lines if not line.startswith("volant: ")]


async def test_the_program_is_the_workload_of_its_vm(daemon: Daemon, image: str) -> None:
    script = "echo one; read line; echo got $line >&2; touch /ready; read line; exit 3"
    async with daemon.client() as client:
        async with volar(daemon, "-i", "--name", "demo", "-e", "A=b", image, "sh", "-c", script) as process:
            await shown(process, b"one\n")
            vm = await client.vms.get("demo")
            assert vm.workload is not None
            assert (vm.workload.state, vm.status) == ("starting", "running")
            await send(process, b"two\n")
            assert (await client.vms.wait("demo", ["ready"], timeout_s=RUN_S)).outcome == "met"
            await send(process, b"three\n")
            assert await process.wait() == 3
        vm = await client.vms.get("demo")
        assert vm.workload is not None
        assert (vm.status, vm.workload.exit_code, vm.reason and vm.reason.code) == ("stopped", 3, "workload_failed")
        assert await log_of(client, "demo") == ["one", "got two"]
        async with client.events(after="0", vm="demo") as events:
            kinds = set[str]()
            while "WORKLOAD_FAILED" not in kinds:
                event = await events.receive()
                assert isinstance(event, Event)
                kinds.add(event.type)
        assert {"WORKLOAD_STARTED", "WORKLOAD_READY"} <= kinds
        # The next start runs it again, in the background and without input.
        await client.vms.start("demo")
        await until(client, "demo", "stopped")
        assert (await log_of(client, "demo")).count("one") == 2
        await client.vms.delete("demo")


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed: .ci/system-packages network")
async def test_with_default_settings_the_second_run_of_an_image_claims_a_warm_process(
    make_daemon: Callable[..., Daemon], image: str
) -> None:
    daemon = make_daemon("--templates", "auto", "--standby", "auto", "--network", "user")
    async with volar(daemon, "--rm", image, "echo", "first") as process:
        assert await process.wait() == 0
    waiting = await filled(daemon)
    async with volar(daemon, "-d", "--name", "second", image, "sleep", "1000") as process:
        assert await process.wait() == 0
    async with daemon.client() as client:
        vm = await client.vms.get("second")
    assert (vm.booted_from, vm.fallback) == ("template", None)
    assert vm.pid in waiting


async def test_a_large_output_arrives_whole_before_its_vm_is_gone(daemon: Daemon, image: str) -> None:
    script = "head -c 3000000 /dev/zero | tr '\\0' x; exit 5"
    async with volar(daemon, "--rm", "--name", "demo", image, "sh", "-c", script) as process:
        assert process.stdout is not None
        size = 0
        while data := await process.stdout.receive_some():
            size += len(data)
        assert (size, await process.wait()) == (3_000_000, 5)
