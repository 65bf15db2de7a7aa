"""The legal edges between a VM's public states. Another edge is a bug, and raises."""

from __future__ import annotations

from ._row import Status as S

EDGES: frozenset[tuple[S | None, S | None]] = frozenset(
    {
        (None, S.PENDING),
        (S.PENDING, S.STARTING),
        (S.PENDING, S.STOPPED),
        (S.PENDING, S.DELETING),
        (S.STARTING, S.RUNNING),
        (S.STARTING, S.STOPPING),
        (S.STARTING, S.CRASHED),
        (S.STARTING, S.DELETING),
        (S.RUNNING, S.PAUSED),
        (S.RUNNING, S.STOPPING),
        (S.RUNNING, S.CRASHED),
        (S.RUNNING, S.DELETING),
        (S.PAUSED, S.RUNNING),
        (S.PAUSED, S.STOPPING),
        (S.PAUSED, S.CRASHED),
        (S.PAUSED, S.DELETING),
        (S.STOPPING, S.STOPPED),
        (S.STOPPING, S.DELETING),
        (S.STOPPED, S.STARTING),
        (S.STOPPED, S.DELETING),
        (S.CRASHED, S.STARTING),
        (S.CRASHED, S.STOPPED),
        (S.CRASHED, S.DELETING),
        (S.DELETING, None),
    }
)
"""`None` stands for a VM that does not exist, before or after its life."""


class IllegalEdge(Exception):
    """A change of status that the table does not have."""


def check_edge(before: S | None, after: S | None) -> None:
    """:raises IllegalEdge: when a VM can't go from `before` to `after`. Staying is always legal."""
    if before is not after and (before, after) not in EDGES:
        raise IllegalEdge(f"a VM can't go from {before or 'nothing'} to {after or 'nothing'}")
