"""The errors of simulations."""

from __future__ import annotations


class SimulationError(Exception):
    """Base of the errors of simulations. They fail the run even when the program swallows them."""


class RealWorld(SimulationError):
    """The program used real time, randomness, threads or I/O, which no seed decides."""


class Stuck(SimulationError):
    """Every task waits forever, or the run has passed a limit."""


class NotDeterministic(SimulationError):
    """Two runs with one seed differ."""
