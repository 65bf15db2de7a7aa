"""Measures event streams: many readers at once, and one that does not read."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from typing import Any

import trio

from tests.system.kit import REPOSITORY

from ._event_readers import Control
from ._figure import Figure, Pairs
from ._http import LoadError, connect, get
from ._world import listening, scratch

READERS = 500
EVENTS = 2000
ROUNDS = 3
ROUNDS_S = 60.0
"""On a busy machine no further round starts after these seconds."""
UNREAD_EVENTS = 100_000
UNREAD_MB = 16.0

_WARM_EVENTS = 20_000
"""More events than the ring holds, so that it has reached its full size."""
_BITE = 5000
_SERVER = "tests.bench._event_server"


async def event_streams() -> list[Figure]:
    """2,000 events to 500 readers, against plain Hypercorn that sends the same bytes."""
    took, cpu, at_once = Pairs(), Pairs(), Pairs()
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        control, bare_control, body = (str(directory / name) for name in ("ours", "bare", "body"))
        ours = stack.enter_context(listening(_SERVER, "ours", control))
        path = "/api/v1/events/vms"
        save = ("--save", body)
        await _round(ours, path, control, *save)
        bare = stack.enter_context(listening(_SERVER, "bare", bare_control, body))
        began = time.perf_counter()
        for number in range(ROUNDS):
            if number and time.perf_counter() - began > ROUNDS_S:
                break
            sides: list[tuple[str, ...]] = [
                (ours, path, control, *save),
                (bare, "/alike", bare_control),
                (bare, "/bulk", bare_control),
            ]
            if number % 2:
                sides.reverse()
            found = {side[1]: await _round(*side) for side in sides}
            rate = {name: READERS * EVENTS / one["seconds"] for name, one in found.items()}
            took.add(rate[path], rate["/alike"])
            at_once.add(rate[path], rate["/bulk"])
            cpu.add(found[path]["cpu_s"], found["/alike"]["cpu_s"])
    return [
        Figure(
            "event_streams", took.value, "events/s", took.ratio,
            f"the {took.other:.0f} of plain Hypercorn writing the same bytes in the same pieces; "
            f"{READERS} readers, each got all {EVENTS} in order, committed meanwhile",
        ),
        Figure(
            "event_streams_cpu", cpu.value, "s", cpu.ratio, f"Hypercorn's {cpu.other:.3g} s of processor time for that"
        ),
        Figure(
            "event_streams_bulk", at_once.value, "events/s", at_once.ratio,
            f"the {at_once.other:.0f} of plain Hypercorn writing the same bytes 64 KiB at once, as if none were new",
        ),
    ]  # fmt: skip


async def unread_stream() -> list[Figure]:
    """Growth of memory by one reader that never reads, during 100,000 events."""
    with ExitStack() as stack:
        path = str(stack.enter_context(scratch()) / "control")
        url = stack.enter_context(listening(_SERVER, "ours", path))
        control = stack.enter_context(Control(path))

        async def let_pass(events: int) -> float:
            """The maximum of the memory."""
            most = 0.0
            for _ in range(0, events, _BITE):
                figures = await trio.to_thread.run_sync(control.ask, _BITE)
                most = max(most, figures["resident_mb"])
            return most

        await let_pass(_WARM_EVENTS)
        before = await let_pass(_BITE)
        reader = stack.enter_context(connect(url))
        reader.sendall(get(url, "/api/v1/events/vms"))
        if not reader.recv(12).startswith(b"HTTP/1.1 200"):
            raise LoadError("the stream did not begin")
        began = time.perf_counter()
        most = await let_pass(UNREAD_EVENTS)
        rate = UNREAD_EVENTS / (time.perf_counter() - began)
    return [
        Figure(
            "unread_stream", most - before, "MiB",
            to=f"more memory at most while {UNREAD_EVENTS} events, {rate:.0f} a second, pass a reader that never reads",
            within=UNREAD_MB,
        )
    ]  # fmt: skip


async def _round(url: str, path: str, control: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench._event_readers", url, path, control]
    sizes = ["--readers", str(READERS), "--events", str(EVENTS)]
    done = await trio.run_process(
        [*command, *sizes, *options], cwd=REPOSITORY, capture_stdout=True, capture_stderr=True, check=False
    )
    if done.returncode:
        raise LoadError(done.stderr.decode(errors="replace").strip()[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found
