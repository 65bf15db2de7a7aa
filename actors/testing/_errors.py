"""What a simulation raises about itself."""

from __future__ import annotations


class SimulationError(Exception):
    """Base of what a simulation raises about itself. It fails the run even when the program swallows it."""


class RealWorld(SimulationError):
    """The program reached for real time, chance, threads or I/O, which no seed decides."""


class Stuck(SimulationError):
    """Nothing can happen any more, or too much does: every task waits for ever, or the run is past a limit."""


class NotDeterministic(SimulationError):
    """Two runs with one seed were not the same."""
