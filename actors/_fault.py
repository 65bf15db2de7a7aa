"""Named places where a simulation may inject a fault.

A program names the place (`fault("journal.commit")`), and a simulation decides whether it fails. Elsewhere the call
costs the look-up of a context variable, so production code may contain it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

current_faults: ContextVar[Callable[[str], bool] | None] = ContextVar("actors.faults", default=None)
"""Decides for this task and for all that it starts; None outside of a simulation."""


def fault(site: str) -> bool:
    """Raises what the simulation has planned for `site`, or returns whether it fires. Call it before the action.

    True means: behave as if the action had failed, came late or stopped half-way. Outside of a simulation it is always
    False.
    """
    decide = current_faults.get()
    return decide is not None and decide(site)
