"""Named places where things may go wrong.

A program says where (`fault("journal.commit")`), a simulation decides whether. Outside of one the call costs the
look-up of a context variable, so a site may stand in code that runs in earnest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

current_faults: ContextVar[Callable[[str], bool] | None] = ContextVar("actors.faults", default=None)
"""What decides in this task, and in all that it starts; None outside of a simulation."""


def fault(site: str) -> bool:
    """Call it where the thing named `site` is about to be done.

    True when the site fires and was given nothing to raise: then behave as if the thing had failed, or had come
    late, or half. Outside of a simulation always False.

    Raises whatever the simulation has planned for the site.
    """
    decide = current_faults.get()
    return decide is not None and decide(site)
