"""A guest's clocks and timers are right in VMs of every origin, and over pauses, snapshots and forks."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import pytest
import trio

from tests.system.clocks import GuestClocks, Reading, guest_clocks
from tests.system.kit import BOOT_S, Daemon, boot, run, until
from volant.client import Client
from volant.host import Host
from volant.model import ForkVm, RestoreVm, TakeSnapshot

CLOCK_S = 0.05
RATE = 0.001
"""Linux trusts a first measurement of its time stamp counter's rate that is off by half of it."""
SLEEP_S = 4.0
"""Longer than it takes to pause or to copy a guest."""
AWAY_S = 6.0
"""How long a guest does not run."""
TIMERS = f"""
import json, os, threading, time
facts = {{"began": time.monotonic(), "due": time.time() + {SLEEP_S}, "went_back": 0.0}}

def sleep():
    time.sleep({SLEEP_S})
    facts["slept"] = time.monotonic() - facts["began"]

def alarm():
    timer = os.timerfd_create(time.CLOCK_REALTIME)
    os.timerfd_settime(timer, flags=os.TFD_TIMER_ABSTIME, initial=facts["due"])
    os.read(timer, 8)
    facts["fired"] = time.time()

threads = [threading.Thread(target=sleep), threading.Thread(target=alarm)]
for thread in threads:
    thread.start()
os.close(os.open("/run/began", os.O_CREAT))
last = time.monotonic()
while any(thread.is_alive() for thread in threads):
    time.sleep(0.002)
    now = time.monotonic()
    facts["went_back"] = max(facts["went_back"], last - now)
    last = now
with open("/run/timers.new", "w") as file:
    json.dump(facts, file)
os.rename("/run/timers.new", "/run/timers")
"""


@dataclass(frozen=True)
class Timers:
    """What became of a sleep and of an alarm for a time of day."""

    slept: float
    """Seconds that the monotonic clock went on during the sleep."""
    due: float
    fired: float
    """When it woke its program, by the guest's wall clock."""


async def test_timers_wait_while_a_guest_is_paused_and_alarms_ring_afterwards(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await boot(client, "demo")
        async with guest_clocks(client, "demo") as clocks:
            before = await clocks.read()
            began = time.monotonic()
            await begin_timers(client, "demo")
            (copy,) = await client.vms.fork("demo", ForkVm())
            await client.vms.apply_and_wait("demo", "pause", ["paused"])
            paused = time.monotonic()
            await trio.sleep(AWAY_S)
            resumed, away_s = time.time(), time.monotonic() - paused
            await client.vms.apply_and_wait("demo", "resume", ["running"])
            check_wall_clock(await clocks.read())
            timers = await timers_of(client, "demo")
            assert time.monotonic() - began >= SLEEP_S + away_s
            assert timers.slept < SLEEP_S + away_s / 2, "the monotonic clock counted the pause"
            assert timers.fired >= resumed - CLOCK_S
            after = await clocks.read()
            assert fell_behind_s(before, after) >= away_s
        # A copy was not paused for long.
        await until(client, copy.name, "running")
        assert (await timers_of(client, copy.name)).slept < SLEEP_S + away_s / 2
        async with guest_clocks(client, copy.name) as clocks:
            await until_right(clocks)


@pytest.mark.full
async def test_timers_go_on_in_copies(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await boot(client, "demo")
        async with guest_clocks(client, "demo") as clocks:
            before = await clocks.read()
        await begin_timers(client, "demo")
        await client.snapshots.take("demo", TakeSnapshot(name="asleep"))
        (forked,) = await client.vms.fork("demo", ForkVm())
        await until(client, forked.name, "running")
        await trio.sleep(AWAY_S)
        restored_at = time.time()
        await client.vms.create_and_wait(RestoreVm(name="restored", from_snapshot="asleep"), timeout_s=BOOT_S)
        for name in ("demo", forked.name, "restored"):
            timers = await timers_of(client, name)
            assert timers.slept < SLEEP_S + AWAY_S / 2, name
            assert timers.fired >= (restored_at if name == "restored" else timers.due) - CLOCK_S, name
            async with guest_clocks(client, name) as clocks:
                await check_clocks(clocks)
                after = await clocks.read()
            assert after.monotonic > before.monotonic, name
            assert fell_behind_s(before, after) >= (AWAY_S if name == "restored" else 0), name
        await client.snapshots.delete("asleep")


@pytest.mark.full
@pytest.mark.parametrize("how", ["cold", "template"])
async def test_an_idle_guest_keeps_time(daemon: Daemon, how: str) -> None:
    async with daemon.client() as client:
        vm = await boot(client, "idle", boot=how)
        assert vm.booted_from == how
        if Host().machine.tsc_khz():
            source = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
            assert (await run(client, "idle", "cat", source)).strip() == "tsc"
        async with guest_clocks(client, "idle") as clocks:
            await check_clocks(clocks)
            assert await clocks.sleep(0.5) >= 0.5


async def begin_timers(client: Client, name: str) -> None:
    """Starts the timers in the background."""
    await run(client, name, "sh", "-c", f"python3.13 -c '{TIMERS}' >/dev/console 2>&1 &")
    with trio.fail_after(BOOT_S):
        while not await run(client, name, "sh", "-c", "ls /run/began 2>/dev/null || true"):  # noqa: ASYNC110
            await trio.sleep(0.02)


async def timers_of(client: Client, name: str) -> Timers:
    """Waits for the timers; checks what holds for all of them."""
    with trio.fail_after(BOOT_S):
        while not (text := await run(client, name, "sh", "-c", "cat /run/timers 2>/dev/null || true")):  # noqa: ASYNC110
            await trio.sleep(0.1)
    found = json.loads(text)
    assert found["went_back"] == 0.0, (name, found)
    assert found["slept"] >= SLEEP_S, (name, found)
    assert found["fired"] >= found["due"] - CLOCK_S, (name, found)
    return Timers(found["slept"], found["due"], found["fired"])


async def until_right(clocks: GuestClocks) -> Reading:
    """Waits until the wall clock is right: on a busy host it is set again later."""
    with trio.fail_after(BOOT_S):
        while not is_right(reading := await clocks.read()):  # noqa: ASYNC110 - the daemon offers no wait
            await trio.sleep(0.5)
    return reading


async def check_clocks(clocks: GuestClocks) -> None:
    """Checks the wall clock, and that a second of the guest is one of the host."""
    before = await until_right(clocks)
    await clocks.sleep(SLEEP_S)
    after = await clocks.read()
    check_wall_clock(after)
    assert fell_behind_s(before, after) >= 0, (before, after)
    assert fell_behind_s(after, before) >= 0, (before, after)


def fell_behind_s(before: Reading, after: Reading) -> float:
    """Returns the most that a guest's monotonic clock may have fallen behind the host's."""
    may_be_s = before.error_s + after.error_s + RATE * abs(after.host_monotonic - before.host_monotonic)
    return before.monotonic_ahead_s - after.monotonic_ahead_s + may_be_s


def check_wall_clock(reading: Reading) -> None:
    assert is_right(reading), reading


def is_right(reading: Reading) -> bool:
    return abs(reading.wall_ahead_s) <= CLOCK_S + reading.error_s
