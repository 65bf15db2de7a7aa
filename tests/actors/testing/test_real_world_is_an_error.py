"""Real time, randomness, threads and I/O are errors in a simulation, and errors name the place."""

from __future__ import annotations

import datetime
import linecache
import logging
import os
import random
import secrets
import socket
import sys
import threading
import time
import traceback
import types
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import trio

from actors import Actor, Child, Request, Supervisor, handles, open_system
from actors.testing import RealWorld, Simulation, allow_real, simulate

HERE = Path(__file__)


@dataclass
class Stamped:
    at: float = field(default_factory=time.time)


REAL: dict[str, Callable[[], Any]] = {
    "time.time": lambda: time.time(),
    "a name that was imported": lambda: monotonic(),
    "a stored function": lambda: {"clock": time.perf_counter}["clock"](),
    "a default factory": lambda: Stamped(),
    "time.sleep": lambda: time.sleep(0.01),
    "datetime.now": lambda: datetime.datetime.now(),
    "datetime.now with a zone": lambda: datetime.datetime.now(datetime.UTC),
    "date.today": lambda: datetime.date.today(),
    "random.random": lambda: random.random(),
    "random.choice": lambda: random.choice([1, 2]),
    "random.shuffle": lambda: random.shuffle([1, 2]),
    "an unseeded Random": lambda: random.Random(),
    "SystemRandom": lambda: random.SystemRandom(),
    "secrets": lambda: secrets.token_hex(),
    "os.urandom": lambda: os.urandom(4),
    "uuid1": lambda: uuid.uuid1(),
    "uuid4": lambda: uuid.uuid4(),
    "a thread": lambda: threading.Thread(target=print).start(),
    "trio.to_thread": lambda: trio.to_thread.run_sync(int),
    "a process": partial(trio.run_process, ["true"]),
    "a connection": partial(trio.open_tcp_stream, "127.0.0.1", 9),
    "a socket": lambda: socket.socket(),
    "a pipe": partial(trio.lowlevel.wait_readable, 0),
    "open": lambda: open(HERE).read(),  # noqa: PTH123, SIM115
    "pathlib": lambda: HERE.read_text(),
    "trio.Path": lambda: trio.Path(HERE).read_text(),
    "a directory": lambda: list(HERE.parent.iterdir()),
}


def _traceback() -> types.TracebackType | None:
    linecache.clearcache()
    try:
        raise LookupError
    except LookupError as exc:
        return exc.__traceback__


async def attempt(what: Callable[[], Any]) -> None:
    result = what()
    if isinstance(result, Awaitable):
        await result


@pytest.mark.parametrize("what", REAL.values(), ids=REAL)
def test_the_error_names_the_place(what: Callable[[], Any]) -> None:
    async def main(sim: Simulation) -> None:
        await attempt(what)

    with pytest.raises(RealWorld) as caught:
        simulate(main, seed=1)
    text = str(caught.value)
    assert "no seed decides it" in text
    assert HERE.name in text
    assert "allow_real(" in text


def test_a_program_that_swallows_the_error_fails_all_the_same() -> None:
    async def main(sim: Simulation) -> None:
        try:
            time.time()
        except Exception:
            await trio.sleep(1)

    with pytest.raises(RealWorld, match=r"time\.time\(\)"):
        simulate(main, seed=1)


@dataclass(frozen=True)
class Now(Request[float]):
    pass


class Clock(Actor):
    @handles(Now)
    async def now(self, message: Now) -> float:
        return time.time()


def test_an_actor_is_not_restarted_after_the_error() -> None:
    async def main(sim: Simulation) -> None:
        child = Child("clock", Clock)
        async with open_system(Supervisor(intensity=1000, children=[child]), rng=sim.rng):
            while True:
                with trio.move_on_after(1):
                    await child.ref.ask(Now(), timeout_s=1)

    with pytest.raises(RealWorld, match=r"in Clock\.now"):
        simulate(main, seed=1)


def test_a_system_without_a_seeded_rng_is_an_error() -> None:
    async def main(sim: Simulation) -> None:
        async with open_system(Supervisor(children=[])):
            pass

    with pytest.raises(RealWorld, match="open_system takes it as `rng`"):
        simulate(main, seed=1)


HARMLESS: dict[str, Callable[[Simulation], object]] = {
    "a seeded Random": lambda sim: random.Random(3).choice([1, 2]),
    "the simulation's own": lambda sim: sim.rng.shuffle([1, 2]),
    "a date": lambda sim: datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(1),
    "formatting a time": lambda sim: time.strftime("%H", time.gmtime(0)),
    "a log record": lambda sim: logging.getLogger("actors.test").warning("stamped with the real time"),
    "an import": lambda sim: __import__("wave"),
    "a traceback": lambda sim: traceback.format_exception(ValueError().with_traceback(_traceback())),
}


@pytest.mark.parametrize("what", HARMLESS.values(), ids=HARMLESS)
def test_seeded_randomness_and_python_itself_are_allowed(what: Callable[[Simulation], object]) -> None:
    async def main(sim: Simulation) -> None:
        what(sim)

    sys.modules.pop("wave", None)
    simulate(main, seed=1)


def test_a_place_that_calls_different_functions_stays_watched() -> None:
    async def main(sim: Simulation) -> None:
        for chance in (sim.rng, random):
            chance.random()

    with pytest.raises(RealWorld):
        simulate(main, seed=1)


def test_allowed_work_takes_no_virtual_time() -> None:
    async def main(sim: Simulation) -> tuple[str, float]:
        with trio.move_on_after(3600) as hour:
            with allow_real("threads", "files"):
                text = await trio.to_thread.run_sync(HERE.read_text)
        assert not hour.cancelled_caught
        before = trio.current_time()
        await trio.sleep(5)
        return text, trio.current_time() - before

    text, slept = simulate(main, seed=1)
    assert text.startswith('"""Real time')
    assert slept == 5


def test_allowing_one_kind_allows_no_other() -> None:
    async def main(sim: Simulation) -> None:
        with allow_real("files"):
            REAL["pathlib"]()
            time.time()

    with pytest.raises(RealWorld, match=r"time\.time"):
        simulate(main, seed=1)
    with pytest.raises(ValueError, match="allow_real"):
        with allow_real("disk"):  # type: ignore[arg-type]  # the point
            pass


def test_outside_of_a_simulation_everything_is_real() -> None:
    async def main(sim: Simulation) -> None:
        await trio.sleep(1)

    simulate(main, seed=1)
    for name in ("time.time", "random.random", "pathlib", "uuid4", "a thread"):
        REAL[name]()
    with allow_real("time"):
        trio.run(partial(attempt, REAL["trio.to_thread"]))


def test_other_threads_are_not_watched() -> None:
    go, done = threading.Event(), threading.Event()
    seen: list[float] = []

    def other() -> None:
        go.wait()
        seen.append(time.time())
        done.set()

    async def main(sim: Simulation) -> None:
        with allow_real("time", "threads"):
            go.set()
            assert done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    simulate(main, seed=1)
    thread.join()
    assert seen


def test_one_process_holds_one_simulation_at_a_time() -> None:
    errors: list[BaseException] = []

    def second() -> None:
        try:
            simulate(first, seed=2)
        except RuntimeError as exc:
            errors.append(exc)

    async def first(sim: Simulation) -> None:
        with allow_real("threads"):
            await trio.to_thread.run_sync(second)

    simulate(first, seed=1)
    assert "one at a time" in str(errors[0])
