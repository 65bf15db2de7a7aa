"""The problems of servers that don't answer."""

from __future__ import annotations

from volant.model import Problem


def unreachable(vm: str, why: str) -> Problem:
    """Returns the 502 for a guest that does not answer."""
    return Problem(502, "agent-unreachable", f"VM {vm!r} does not answer: {why}", vm=vm)
