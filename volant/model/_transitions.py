"""The transitions between a VM's public states. A transition that is not in the table is a bug."""

from __future__ import annotations

from ._row import Status as S

TRANSITIONS: frozenset[tuple[S | None, S | None]] = frozenset(
    {
        (None, S.PENDING),
        (None, S.STOPPED),
        (None, S.CRASHED),
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
"""`None`: the VM does not exist, yet or any more."""


class IllegalTransition(Exception):
    """The table has no such transition."""


def check_transition(before: S | None, after: S | None) -> None:
    """:raises IllegalTransition: a VM can't go from `before` to `after`. Staying is always legal."""
    if before is not after and (before, after) not in TRANSITIONS:
        raise IllegalTransition(f"a VM can't go from {before or 'nothing'} to {after or 'nothing'}")
