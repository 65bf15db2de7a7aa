"""The same seed gives the same run: in this process, in another one, under another hash seed, on another Python."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import trio

from actors import Actor, ActorDown, AskTimeout, Backoff, Child, Request, Supervisor, fault, handles, open_system
from actors.testing import NotDeterministic, Simulation, Stuck, check_deterministic, simulate

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Work(Request[int]):
    number: int


class Server(Actor):
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    async def on_start(self) -> None:
        self.ctx.spawn(self.tick)

    async def tick(self) -> None:
        while True:
            await trio.sleep(self.rng.random() * 5)
            fault("server.tick")

    @handles(Work)
    async def work(self, message: Work) -> int:
        await trio.sleep(self.rng.random())
        return message.number


async def system(sim: Simulation) -> list[str]:
    """Six servers that crash by a fault site, and clients that ask them."""
    sim.faults.turn_on("server.tick", 0.1, OSError)
    servers = [Child(f"s{n}", partial(Server, sim.rng)) for n in range(6)]
    outcomes = []

    async def client(number: int) -> None:
        while True:
            await trio.sleep(sim.rng.random() * 3)
            try:
                outcomes.append(str(await sim.rng.choice(servers).ref.ask(Work(number), timeout_s=0.9)))
            except (ActorDown, AskTimeout) as exc:
                outcomes.append(type(exc).__name__)

    root = Supervisor(intensity=10_000, children=servers, backoff=Backoff(cap_s=1))
    async with open_system(root, rng=sim.rng):
        with trio.move_on_after(20):
            async with trio.open_nursery() as nursery:
                for number in range(5):
                    nursery.start_soon(client, number)
    return [*outcomes, sim.digest]


def test_a_seed_decides_everything() -> None:
    runs = [simulate(system, seed=seed) for seed in (1, 2, 1)]
    assert runs[0] == runs[2] != runs[1]
    assert {"ActorDown", "AskTimeout"} < set(runs[0])


PROGRAM = """
from actors.testing import check_deterministic
from {module} import system
print(check_deterministic(system, seed=7))
"""


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_and_another_hash_seed_give_the_same_trace(hash_seed: str) -> None:
    program = PROGRAM.format(module=Path(__file__).stem)
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout.strip() == check_deterministic(system, seed=7), ran.stderr


def test_an_earlier_run_makes_no_difference() -> None:
    first = check_deterministic(system, seed=3)
    random.seed(5)
    simulate(system, seed=4)
    garbage: list[object] = []
    garbage.append(garbage)
    assert check_deterministic(system, seed=3) == first


def test_seeds_run_ready_tasks_in_different_orders() -> None:
    async def main(sim: Simulation) -> str:
        order: list[str] = []

        async def task(name: str) -> None:
            order.append(name)

        async with trio.open_nursery() as nursery:
            for name in "abcd":
                nursery.start_soon(task, name)
        return "".join(order)

    assert len({simulate(main, seed=seed) for seed in range(30)}) > 10


def test_the_first_difference_is_shown() -> None:
    runs = count()

    async def main(sim: Simulation) -> None:
        await trio.sleep(1)
        sim.note("all is well")
        await trio.sleep(2 + next(runs))
        await trio.sleep(1)

    with pytest.raises(NotDeterministic) as caught:
        check_deterministic(main, seed=1)
    text = str(caught.value)
    assert "1.000000 s   note  all is well" in text
    assert "first:      3.000000 s" in text
    assert "second:     4.000000 s" in text


def test_a_run_that_goes_on_or_ends_early_is_a_difference() -> None:
    for lengths in ([1, 2], [2, 1]):
        left = iter(lengths)

        async def main(sim: Simulation, left: object = left) -> None:
            for _ in range(next(left)):  # type: ignore[call-overload]  # is an iterator
                await trio.sleep(1)

        with pytest.raises(NotDeterministic):
            check_deterministic(main, seed=1)


def test_messages_that_only_look_different_are_a_difference() -> None:
    numbers = count()

    async def main(sim: Simulation) -> None:
        child = Child("server", partial(Server, random.Random(0)))
        async with open_system(Supervisor(children=[child]), rng=sim.rng):
            await child.ref.ask(Work(next(numbers)), timeout_s=2)

    with pytest.raises(NotDeterministic, match=r"Work\(number=0\)[^|]*second: .*Work\(number=1\)"):
        check_deterministic(main, seed=1)


def test_a_failure_says_which_seed_and_what_happened_last() -> None:
    async def main(sim: Simulation) -> None:
        await trio.sleep(1.5)
        sim.note("about to fail")
        raise LookupError("gone")

    with pytest.raises(LookupError) as caught:
        simulate(main, seed=41)
    (story,) = caught.value.__notes__
    assert "seed 41, after 1.500000 virtual seconds" in story
    assert "about to fail" in story
    with pytest.raises(LookupError):
        check_deterministic(main, seed=41)


def test_every_task_waiting_for_ever_is_found_and_named() -> None:
    async def main(sim: Simulation) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.Event().wait, name="waits in vain")
            async with open_system(Supervisor(children=[Child("s", partial(Server, sim.rng))]), rng=sim.rng) as found:
                found["s"].tell(Work(1))
            await trio.sleep(3)
            await trio.sleep_forever()

    with pytest.raises(Stuck) as caught:
        simulate(main, seed=1)
    assert "waits in vain" in str(caught.value)
    assert Path(__file__).name in str(caught.value)


def test_the_trace_is_text_for_people() -> None:
    async def main(sim: Simulation) -> list[str]:
        child = Child("server", partial(Server, sim.rng))
        async with open_system(Supervisor(children=[child]), rng=sim.rng):
            await child.ref.ask(Work(1), timeout_s=2)
            sim.note("asked")
        return sim.trace(last=200)

    text = "\n".join(simulate(main, seed=1))
    for line in (
        "starting server",
        "ask server Work",
        "handle server Work",
        "reply server int",
        "asked",
        "exit server stopped",
    ):
        assert line in text


def test_limits_end_endless_runs() -> None:
    async def spin(sim: Simulation) -> None:
        while True:
            await trio.lowlevel.checkpoint()

    async def tick(sim: Simulation) -> None:
        for _ in count():
            await trio.sleep(10)

    with pytest.raises(Stuck, match="more than 500 steps"):
        simulate(spin, seed=1, limit_steps=500)
    with pytest.raises(Stuck, match="not finished after 100 virtual seconds"):
        simulate(tick, seed=1, limit_s=100)
    with pytest.raises(ValueError, match="must be positive"):
        simulate(tick, seed=1, limit_s=0)


def test_everything_is_as_before_afterwards() -> None:
    async def main(sim: Simulation) -> None:
        raise LookupError

    run = trio._core._run
    before = run._ALLOW_DETERMINISTIC_SCHEDULING, run._r, run._r.getstate(), sys.getprofile()
    with pytest.raises(LookupError):
        simulate(main, seed=1)
    assert (run._ALLOW_DETERMINISTIC_SCHEDULING, run._r, run._r.getstate(), sys.getprofile()) == before


async def test_simulate_refuses_to_run_inside_trio() -> None:
    with pytest.raises(RuntimeError, match="call it from a plain function"):
        simulate(system, seed=1)
