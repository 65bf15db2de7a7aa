"""`python -m tests.bench.simulation_bench` measures the virtual time that a simulation of 40 actors runs in a second.

Each actor asks another one every five virtual seconds on average, which takes half a second to answer. The baseline of
each pair is the same program on Trio's autojump clock, without the simulation's checks and records.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median

import trio
from trio.testing import MockClock

from actors import Actor, ActorDown, Child, Ref, Request, Supervisor, handles, open_system
from actors.testing import Simulation, simulate

from ._figure import Figure, Pairs

ACTORS = 40
VIRTUAL_S = 600
ROUNDS = 7


@dataclass(frozen=True)
class Greet(Request[int]):
    """Answered after a while."""

    number: int


@dataclass(frozen=True)
class Tick:
    """An actor's own timer."""


class Node(Actor):
    """Asks other actors, and answers them."""

    def __init__(self, rng: Random, peers: list[Ref[Node]]) -> None:
        self.rng = rng
        self.peers = peers

    async def on_start(self) -> None:
        self.ctx.send_after(self.rng.random() * 10, Tick())

    @handles(Tick)
    async def tick(self, message: Tick) -> None:
        self.ctx.send_after(self.rng.random() * 10, Tick())
        self.ctx.spawn(self.ask)

    async def ask(self) -> None:
        peer = self.rng.choice(self.peers)
        if peer is not self.ctx.self_ref:
            with suppress(ActorDown):  # at the end, if one has stopped before the other
                await peer.ask(Greet(1), timeout_s=60)

    @handles(Greet)
    async def greet(self, message: Greet) -> int:
        await trio.sleep(self.rng.random())
        return message.number


async def program(rng: Random) -> None:
    """Runs the system for `VIRTUAL_S` virtual seconds."""
    peers: list[Ref[Node]] = []
    children = [Child(f"node-{n}", partial(Node, rng, peers)) for n in range(ACTORS)]
    peers += [child.ref for child in children]
    async with open_system(Supervisor(children=children), rng=rng):
        await trio.sleep(VIRTUAL_S)


async def simulated(sim: Simulation) -> int:
    """Returns the number of steps."""
    await program(sim.rng)
    return sim.steps


def main() -> int:
    """Measures and prints."""
    took = Pairs()
    steps = 0
    for seed in range(ROUNDS):
        seconds = _timed(lambda seed=seed: trio.run(program, Random(seed), clock=MockClock(autojump_threshold=0)))  # type: ignore[misc]  # a default binds it
        took.bare.append(VIRTUAL_S / seconds)
        began = time.perf_counter()
        steps += simulate(simulated, seed=seed)
        took.ours.append(VIRTUAL_S / (time.perf_counter() - began))
    per_s = steps / ROUNDS / VIRTUAL_S * median(took.ours)
    figure = Figure(
        "simulation",
        took.value,
        "virtual seconds/s",
        took.ratio,
        f"the {took.other:.0f} of a bare run of {ACTORS} actors",
    )
    sys.stdout.write(f"{figure}\n{per_s:,.0f} steps of tasks/s, {steps / ROUNDS / VIRTUAL_S:.0f} in a virtual second\n")
    return 0


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
