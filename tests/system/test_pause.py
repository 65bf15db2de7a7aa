"""A guest is paused and resumed: it loses nothing, connections stay open, and its clock is right."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, Stopwatch, boot, is_alive, load, next_event, run, spec, until
from volant.client import Client, ClientProblem, LogLine

CYCLES = load("VOLANT_TEST_PAUSES", usual=20, full=1000)
CLOCK_OFF_S = 0.5
PAUSED_S = 3.0

TALKER = """
import sys, time
for i in range(10_000_000):
    sys.stdout.write(f"line {i}\\n")
    sys.stdout.flush()
    time.sleep(0.01)
"""


async def check_clock(client: Client, name: str) -> None:
    """Checks that the guest's clock is right, in whole seconds."""
    before = time.time()
    told = int(await run(client, name, "date", "+%s"))
    assert before - 1 - CLOCK_OFF_S <= told <= time.time() + CLOCK_OFF_S


async def pause(client: Client, name: str) -> None:
    waited = await client.vms.apply_and_wait(name, "pause", ["paused"])
    assert waited.outcome == "met", waited
    assert waited.vm is not None
    assert (waited.vm.status, waited.vm.desired, waited.vm.reason) == ("paused", "paused", None)


async def resume(client: Client, name: str) -> None:
    waited = await client.vms.apply_and_wait(name, "resume", ["running"])
    assert waited.outcome == "met", waited
    assert waited.vm is not None
    assert (waited.vm.status, waited.vm.desired, waited.vm.reason) == ("running", "running", None)


async def test_no_line_is_lost_and_no_stream_breaks_over_many_pauses(daemon: Daemon) -> None:
    async with daemon.client() as client:
        workload = {"entrypoint": ["python3.13", "-c", TALKER], "restart": "never"}
        await client.plugins.install({"name": "talker", "version": "1", "workload": workload})
        waited = await client.vms.create_and_wait(spec("demo", plugin="talker"), timeout_s=BOOT_S)
        assert waited.vm is not None
        numbers: list[int] = []
        written: list[bytes] = []
        over = trio.Event()

        async def follow() -> None:
            async with client.vms.logs("demo", since=0, streams=["stdout"]) as log:
                while not over.is_set():
                    item = await log.receive()
                    assert isinstance(item, LogLine), item
                    numbers.append(int(item.line.removeprefix("line ")))

        async def listen() -> None:
            command = ["sh", "-c", "i=0; while [ ! -e /tmp/over ]; do i=$((i+1)); echo $i; sleep 0.5; done"]
            async with client.vms.exec("demo", command, timeout_s=300) as process:
                async for piece in process:
                    written.extend(piece.data.split())
            assert process.end is not None
            assert process.end.exit_code == 0, process.end

        watch = Stopwatch()
        async with client.events() as feed, trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            nursery.start_soon(listen)
            with trio.fail_after(400):
                while not (numbers and written):  # noqa: ASYNC110 - another process's, and it offers no wait
                    await trio.sleep(0.02)
                watch = Stopwatch()
                for _ in range(CYCLES):
                    await pause(client, "demo")
                    await resume(client, "demo")
                print(f"{CYCLES} pauses in {watch.seconds:.1f} s, {len(numbers)} lines")
                before = len(numbers)
                while len(numbers) < before + 100:  # noqa: ASYNC110 - likewise
                    await trio.sleep(0.02)
                over.set()
                await run(client, "demo", "touch", "/tmp/over")
            kinds: list[str] = []
            while len(kinds) < 2 * CYCLES:
                kind = (await next_event(feed)).type
                # The start of its workload is reported up to a second after that of the VM.
                kinds += [kind] if kind.startswith("VM_") else []
        assert kinds == ["VM_PAUSED", "VM_RUNNING"] * CYCLES
        assert numbers == list(range(len(numbers)))
        assert written == [b"%d" % number for number in range(1, len(written) + 1)]
        after = await client.vms.get("demo")
        assert (after.pid, after.boots) == (waited.vm.pid, 1)
        channel = (await client.vms.inspect("demo"))["actor"]["actor"]["process"]["channel"]
        assert channel["links"] == 1
        await check_clock(client, "demo")


async def test_a_paused_guest_refuses_requests_at_once_and_has_the_right_clock_after_a_resume(daemon: Daemon) -> None:
    async with daemon.client() as client, daemon.http() as http:
        # A booting VM is paused once it runs.
        await client.vms.create(spec("demo"))
        await client.vms.pause("demo")
        vm = await until(client, "demo", "paused")
        assert vm is not None
        etag = (await http.get("/api/v1/vms/demo")).headers["etag"]
        newest = await client.newest_event()
        # A second pause does nothing.
        await pause(client, "demo")
        assert await client.newest_event() == newest
        for method, path in (
            ("GET", "/api/v1/vms/demo/agent/healthz"),
            ("POST", "/api/v1/vms/demo/agent/v1/exec"),
            ("GET", "/api/v1/vms/demo/agent/v1/files/etc/hostname"),
            ("GET", "/api/v1/vms/demo/ports/8080/"),
            ("GET", "/ws/v1/vms/demo/devtools/json/version"),
        ):
            refused = await http.request(method, path)
            assert (refused.status_code, refused.json()["type"]) == (409, "urn:volant:error:vm-not-running"), path
            assert refused.json()["hint"] == "`volar vms resume demo` lets it go on", path
        assert (await http.get("/api/v1/vms/demo/logs")).status_code == 200
        assert (await http.get("/api/v1/vms?status=paused")).json()[0]["name"] == "demo"
        await trio.sleep(PAUSED_S)

        assert (await http.post("/api/v1/vms/demo/resume", headers={"If-Match": '"other"'})).status_code == 412
        resumed = await http.post("/api/v1/vms/demo/resume?wait=running", headers={"If-Match": etag})
        assert (resumed.status_code, resumed.headers["volant-wait"]) == (200, "met")
        await check_clock(client, "demo")

        # A stop works on a paused guest, too.
        await pause(client, "demo")
        stopped = await client.vms.apply_and_wait("demo", "stop", ["stopped"])
        assert stopped.outcome == "met"
        inspected = await client.vms.inspect("demo")
        saw = [entry["saw"] for entry in inspected["actor"]["actor"]["history"]]
        assert any(entry.startswith("Ended: guest_shutdown") for entry in saw), saw
        for command in ("pause", "resume"):
            with pytest.raises(ClientProblem) as denied:
                await client.vms.apply_and_wait("demo", command, ["paused"])
            assert denied.value.status == 409


async def test_a_restarted_daemon_keeps_a_paused_vm_and_resumes_one_that_should_run(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon(ephemeral=False)
    async with daemon.client() as client:
        vm = await boot(client, "demo")
        assert vm.pid is not None
        assert await run(client, "demo", "touch", "/tmp/mine") == ""
        await pause(client, "demo")
    daemon.kill()
    async with daemon.started() as client:
        found = await client.vms.get("demo")
        assert (found.status, found.pid) == ("paused", vm.pid)
        await resume(client, "demo")
        assert await run(client, "demo", "ls", "/tmp/mine") == "/tmp/mine\n"
        await check_clock(client, "demo")
        newest = await client.newest_event()
    daemon.kill()
    # The state that a daemon leaves if it is killed while it copies the guest.
    stop_machine(daemon, vm.id)
    await trio.sleep(PAUSED_S)
    async with daemon.started() as client:
        with trio.fail_after(30):
            while True:
                # The daemon resumes it shortly after its start.
                with suppress(ClientProblem, AssertionError):
                    await check_clock(client, "demo")
                    break
        assert (await client.vms.get("demo")).pid == vm.pid
        assert await client.newest_event() == newest
        await pause(client, "demo")
        await client.vms.delete("demo")
        assert not is_alive(vm.pid)


def stop_machine(daemon: Daemon, vm_id: int) -> None:
    """Stops the guest through QMP, and disconnects."""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(20)
        control.connect(str(daemon.runtime_dir / "vms" / str(vm_id) / "qmp.sock"))
        lines = control.makefile("rwb")
        lines.readline()
        for number, command in enumerate(("qmp_capabilities", "stop", "query-status")):
            lines.write(json.dumps({"execute": command, "id": number}).encode() + b"\n")
            lines.flush()
            while (answer := json.loads(lines.readline())).get("id") != number:
                pass
        assert answer["return"]["status"] == "paused"
