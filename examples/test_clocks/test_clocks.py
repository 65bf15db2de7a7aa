"""Deterministic clocks, from one function to a whole system. Run it: `python -m pytest examples/test_clocks`.

The actor under test is a thermostat: it asks a sensor once a minute and switches a heater.

1. `autojump_clock` of pytest-trio: virtual time for one async test. When all tasks wait, the clock jumps.
2. `open_probe`: a fake for the actor on the other side.
3. `simulated`: virtual time, and a seed that decides task order, random numbers and faults. One test, many runs.
4. `check_deterministic`: the same seed gives the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random

import pytest
import trio
from trio.testing import MockClock

from actors import Actor, ActorDown, AskTimeout, Backoff, Child, Ref, Request, Supervisor, fault, handles, open_system
from actors.testing import Simulation, check_deterministic, open_probe

# The system under test


@dataclass(frozen=True)
class Measure(Request[float]):
    """Asks for the present temperature in degrees."""


@dataclass(frozen=True)
class Look:
    """The thermostat's own timer."""


class Sensor(Actor):
    """A room that cools down unless it is heated."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.degrees = 20.0

    @handles(Measure)
    async def measure(self, message: Measure) -> float:
        await trio.sleep(self.rng.random())
        fault("sensor.measure")
        self.degrees += self.rng.uniform(-1, 1)
        return self.degrees


class Thermostat(Actor):
    """Asks for the temperature every minute. It does not heat if it does not know the temperature."""

    def __init__(self, sensor: Ref[Sensor]) -> None:
        self.sensor = sensor
        self.heating = False

    async def on_start(self) -> None:
        self.ctx.send_after(0, Look())

    @handles(Look)
    async def look(self, message: Look) -> None:
        self.ctx.send_after(60, Look())
        try:
            degrees = await self.sensor.ask(Measure(), timeout_s=5)
        except (ActorDown, AskTimeout):
            self.heating = False
        else:
            self.heating = degrees < 20

    def inspect(self) -> dict[str, object]:
        return {"heating": self.heating}


def heats(thermostat: Ref[Thermostat]) -> bool:
    return bool(thermostat.inspect()["actor"]["heating"])


# 1. Virtual time for one test: waiting takes no time.


async def test_a_minute_is_a_minute(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    await trio.sleep(3600)
    assert trio.current_time() - began == 3600


# 2. A probe in place of the sensor: the test decides what the thermostat measures, and when.


async def test_it_heats_when_it_is_cold_and_stops_without_an_answer(autojump_clock: MockClock) -> None:
    async with open_probe(Sensor) as sensor:
        thermostat = Child("thermostat", partial(Thermostat, sensor.ref))
        async with open_system(Supervisor(children=[thermostat])):
            sensor.reply(await sensor.expect(Measure), 17.5)
            await sensor.expect_nothing(within_s=59)
            assert heats(thermostat.ref)
            await sensor.expect(Measure)  # and no reply
            await trio.sleep(6)
            assert not heats(thermostat.ref)


# 3. The whole system, 25 times, with a sensor that crashes: it always recovers.


def system(sim: Simulation) -> tuple[Supervisor, Child[Thermostat]]:
    sensor = Child("sensor", partial(Sensor, sim.rng))
    thermostat = Child("thermostat", partial(Thermostat, sensor.ref))
    return Supervisor(intensity=1000, children=[sensor, thermostat], backoff=Backoff(cap_s=30)), thermostat


@pytest.mark.simulated(seeds=25, faults={"sensor.measure": (0.3, OSError)})
async def test_it_never_stops_for_good(sim: Simulation) -> None:
    root, thermostat = system(sim)
    async with open_system(root, rng=sim.rng) as running:
        await trio.sleep(3600)
        sim.faults.turn_off()
        await trio.sleep(120)
        assert running.all_running(), running.format_tree()
        assert thermostat.ref.inspect()["restarts"] == 0


# 4. Only the seed decides: run twice, and compare what each task did.


def test_the_same_seed_gives_the_same_run() -> None:
    async def hour(sim: Simulation) -> None:
        root, _ = system(sim)
        async with open_system(root, rng=sim.rng):
            await trio.sleep(3600)

    assert check_deterministic(hour, seed=1) != check_deterministic(hour, seed=2)
