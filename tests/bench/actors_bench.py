"""Measures the runtime against bare Trio and other actor libraries: `python -m tests.bench.actors_bench`.

The sides of a pair alternate. Against Trio it measures the thread's processor time, which other processes hardly
affect; against libraries with several threads it measures wall-clock time, so nothing else should run.

The channel has no buffer, because an ask is also a rendezvous of two tasks. With a buffer of 64 neither side ever
sleeps; those figures are printed without a target. `--check` fails if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import trio

from actors import Actor, Child, DynamicSupervisor, Log, Ref, Request, Started, handles, open_system

from ._figure import Figure, Pairs

ROUNDS = 7
MESSAGES = 20_000
BURST = 1000
BURSTS = 50
STARTS = 10_000
IDLE = 2000
MANY = 10_000_000
IMPORT = "import trio, time; t = time.perf_counter(); import actors; print(time.perf_counter() - t)"


@dataclass(frozen=True, slots=True)
class Get(Request[int]):
    """Answered with a number."""


@dataclass(frozen=True, slots=True)
class Note:
    """Answered with nothing."""


class Target(Actor):
    """Takes messages and does nothing with them."""

    mailbox = 2 * BURST

    @handles(Get)
    async def get(self, message: Get) -> int:
        return 1

    @handles(Note)
    async def note(self, message: Note) -> None:
        pass


def messages() -> Iterator[Figure]:
    """Ask and tell against a memory channel, and ask against other actor libraries for Python."""
    targets = {"ask": 0.75, "ask_with_a_deadline": 0.55, "tell_in_bursts": 10.0}
    took = {(name, room): Pairs() for name in targets for room in (0, 64)}
    own: list[float] = []

    async def ours() -> None:
        pool = DynamicSupervisor()
        async with open_system(pool):
            ref = await pool.start_child(Child("target", Target))
            sides = {
                "ask": (lambda: _ask(ref, math.inf), MESSAGES),
                "ask_with_a_deadline": (lambda: _ask(ref, 10.0), MESSAGES),
                "tell_in_bursts": (lambda: _tell(ref, BURSTS), BURST * BURSTS),
            }
            for name, (side, count) in sides.items():
                for room in (0, 64):
                    bare = await _rate(partial(_channel, room), MESSAGES)
                    took[name, room].ours.append(await _rate(side, count))
                    took[name, room].bare.append((bare + await _rate(partial(_channel, room), MESSAGES)) / 2)
            began = time.perf_counter()
            await _ask(ref, math.inf)
            own.append(MESSAGES / (time.perf_counter() - began))

    peers: dict[str, tuple[Callable[[], float], float]] = {"pykka": (_pykka, 3.0), "xoscar": (_xoscar, 2.0)}
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(ROUNDS):
        gc.collect()
        trio.run(ours)
        for name, (peer, _) in peers.items():
            try:
                rates[name].append(peer())
            except ImportError:
                pass
    for (name, room), pairs in took.items():
        told = f"the {pairs.other:.0f} of a memory channel with {f'a buffer of {room}' if room else 'no buffer'}"
        target = None if room else targets[name]
        yield Figure(
            f"{name}{'_beside_a_buffer' if room else ''}", pairs.value, "messages/s", pairs.ratio, told, at_least=target
        )
    for name, (_, least) in peers.items():
        if not rates[name]:
            print(f"ask_beside_{name} skipped: {name} is not installed")
            continue
        ratio = median(a / b for a, b in zip(own, rates[name], strict=True))
        told = f"{name}'s {median(rates[name]):.0f}"
        yield Figure(f"ask_beside_{name}", median(own), "messages/s", ratio, told, at_least=least)


def starts() -> Iterator[Figure]:
    """Starting actors against starting bare tasks."""
    pairs = Pairs()
    for _ in range(3):
        gc.collect()
        pairs.ours.append(trio.run(_start_actors))
        gc.collect()
        pairs.bare.append(trio.run(_start_tasks))
    told = f"{pairs.other * 1e6:.0f} µs of nursery.start, {STARTS} times"
    yield Figure("start", pairs.value * 1e6, "µs", pairs.ratio, told, at_most=2.5)


def memory() -> Iterator[Figure]:
    """Memory: an idle actor against an idle task; an actor after ten million messages; a cursor that never reads."""
    tracemalloc.start()
    actor, task = trio.run(_idle)
    tracemalloc.stop()
    yield Figure("idle_actor", actor - task, "bytes", to=f"beyond the {task:.0f} of its Trio task")
    before, after, seconds = trio.run(_endure)
    yield Figure(
        "ten_million_messages",
        (after - before) / 1e3,
        "kB more resident",
        to=f"after {seconds:.0f} s, beside the first million",
    )
    tracemalloc.start()
    alone = _append(0)
    lagging = _append(1000)
    tracemalloc.stop()
    yield Figure(
        "a_cursor_that_never_reads",
        (lagging - alone) / 1000,
        "bytes",
        to="each of 1,000, after 200,000 frames in a ring of 100",
    )


def importing() -> Iterator[Figure]:
    """The import of the runtime, after Trio is imported."""
    root = Path(__file__).parents[2]
    took = []
    for _ in range(9):
        ran = subprocess.run(
            [sys.executable, "-c", IMPORT], cwd=root, capture_output=True, text=True, timeout=60, check=True
        )
        took.append(float(ran.stdout) * 1e3)
    yield Figure("import", median(took), "ms", to="beyond Trio's own; target: below 30")


async def _channel(room: int) -> None:
    send, receive = trio.open_memory_channel[int](room)

    async def take() -> None:
        async for _ in receive:
            pass

    async with receive, trio.open_nursery() as nursery:
        nursery.start_soon(take)
        async with send:
            for number in range(MESSAGES):
                await send.send(number)


async def _ask(ref: Ref[Target], timeout_s: float) -> None:
    message = Get()
    for _ in range(MESSAGES):
        await ref.ask(message, timeout_s=timeout_s)


async def _tell(ref: Ref[Target], bursts: int) -> None:
    message = Note()
    for _ in range(bursts):
        for _ in range(BURST):
            ref.tell(message)
        await ref.ask(Get(), timeout_s=math.inf)


async def _rate(side: Callable[[], Awaitable[None]], count: int) -> float:
    began = time.thread_time()
    await side()
    return count / (time.thread_time() - began)


def _pykka() -> float:
    import pykka

    class Peer(pykka.ThreadingActor):
        def on_receive(self, message: object) -> int:
            return 1

    ref = Peer.start()
    try:
        count = MESSAGES // 10
        began = time.perf_counter()
        for _ in range(count):
            ref.ask(Get())
        return count / (time.perf_counter() - began)
    finally:
        ref.stop()


def _xoscar() -> float:
    import xoscar  # type: ignore[import-untyped]  # it has no types

    class Peer(xoscar.Actor):  # type: ignore[misc]  # xoscar has no types
        async def get(self) -> int:
            return 1

    async def main() -> float:
        pool = await xoscar.create_actor_pool("127.0.0.1:0", n_process=0)
        async with pool:
            ref = await xoscar.create_actor(Peer, address=pool.external_address)
            count = MESSAGES // 10
            began = time.perf_counter()
            for _ in range(count):
                await ref.get()
            return count / (time.perf_counter() - began)

    return asyncio.run(main())


async def _bare(*, task_status: Started) -> None:
    task_status.started()
    await trio.sleep_forever()


async def _start_tasks() -> float:
    async with trio.open_nursery() as nursery:
        began = time.thread_time()
        for _ in range(STARTS):
            await nursery.start(_bare)
        took = time.thread_time() - began
        nursery.cancel_scope.cancel()
    return took / STARTS


async def _start_actors() -> float:
    pool = DynamicSupervisor()
    async with open_system(pool):
        began = time.thread_time()
        for number in range(STARTS):
            await pool.start_child(Child(str(number), Target))
        return (time.thread_time() - began) / STARTS


async def _idle() -> tuple[float, float]:
    def used() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    async with trio.open_nursery() as nursery:
        before = used()
        for _ in range(IDLE):
            await nursery.start(_bare)
        task = (used() - before) / IDLE
        nursery.cancel_scope.cancel()
    pool = DynamicSupervisor()
    async with open_system(pool):
        before = used()
        for number in range(IDLE):
            await pool.start_child(Child(str(number), Target))
        return (used() - before) / IDLE, task


async def _endure() -> tuple[int, int, float]:
    pool = DynamicSupervisor()
    async with open_system(pool):
        ref = await pool.start_child(Child("target", Target))
        began = time.perf_counter()
        await _tell(ref, MANY // 10 // BURST)
        before = _resident()
        await _tell(ref, MANY * 9 // 10 // BURST)
        handled = ref.inspect()["handlers"]["Note"]["count"]
        assert handled == MANY, handled
        return before, _resident(), time.perf_counter() - began


def _append(cursors: int) -> int:
    log = Log(max_frames=100, max_bytes=10**6)
    readers = [log.cursor(after=0) for _ in range(cursors)]
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(200_000):
        log.append(b"frame")
    after = tracemalloc.get_traced_memory()[0]
    assert all(reader.after == 0 for reader in readers)
    return after - before


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> int:
    """Measures and prints; with `--check` returns whether a target was missed."""
    benches = {"messages": messages, "starts": starts, "memory": memory, "import": importing}
    parser = argparse.ArgumentParser(prog="python -m tests.bench.actors_bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(benches)}; all by default")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    options = parser.parse_args()
    if unknown := set(options.names) - set(benches):
        parser.error(f"there is no bench named {', '.join(sorted(unknown))}")
    missed = False
    for name, bench in benches.items():
        if not options.names or name in options.names:
            for figure in bench():
                print(figure, flush=True)
                missed |= figure.missed
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
