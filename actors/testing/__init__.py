"""Runs whole systems on virtual time, decided by a seed; and replaces actors by probes, to test one alone."""

from ._errors import NotDeterministic, RealWorld, SimulationError, Stuck
from ._faults import Effect, FaultReport, Faults, Plan, SiteReport
from ._guard import Kind, allow_real
from ._probe import Probe, open_probe
from ._simulate import Simulation, check_deterministic, kill, simulate

__all__ = [
    "Effect",
    "FaultReport",
    "Faults",
    "Kind",
    "NotDeterministic",
    "Plan",
    "Probe",
    "RealWorld",
    "Simulation",
    "SimulationError",
    "SiteReport",
    "Stuck",
    "allow_real",
    "check_deterministic",
    "kill",
    "open_probe",
    "simulate",
]
