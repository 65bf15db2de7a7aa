"""A guest is paused and resumed: it loses nothing, connections stay open, and its clock is right."""

from __future__ import annotations

import time

import trio

from tests.system.kit import BOOT_S, Daemon, Stopwatch, load, next_event, run, spec
from volant.client import Client, LogLine

CYCLES = load("VOLANT_TEST_PAUSES", usual=20, full=1000)
CLOCK_OFF_S = 0.5

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
