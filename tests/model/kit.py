"""A VM's row, and what happens to it, for tests of decisions."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec
from hypothesis import strategies as st

from volant.model import (
    BASE,
    AgentAnswered,
    AskStop,
    AwaitAgent,
    Cleared,
    Command,
    CommandRequest,
    CreateVm,
    Desired,
    Effect,
    Ended,
    EndKind,
    Hold,
    ImageReady,
    Kill,
    Launch,
    Launched,
    Leaves,
    Leaving,
    Pause,
    Paused,
    PrepareImage,
    ProcessIdentity,
    Reason,
    Released,
    Remove,
    Removed,
    RestartDue,
    RestartLater,
    Resume,
    Resumed,
    Seen,
    Stays,
    StepFailed,
    VmRow,
    Woke,
    decide,
    effect_of,
    new_row,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)
PROCESS = ProcessIdentity(42, 1000, "boot", "volant-tag")
WHY = Reason("why", "because")
LAUNCHED = Launched(PROCESS, "qemu", "tcg")


LEAVING = Leaving(id="m1", vm="c1", epoch=1, from_host="h1", to_host="h2", at=NOW, desired=Desired.RUNNING)


def create(**fields: object) -> VmRow:
    request = msgspec.convert({"name": "demo", "cpu_cores": 1, "memory_mb": 128, **fields}, CreateVm)
    return new_row(request, BASE, vm_id=7, now=NOW)


OUTCOMES: Mapping[type[Effect], Seen] = {
    PrepareImage: ImageReady("digest", "volant-tag"),
    Launch: LAUNCHED,
    AwaitAgent: AgentAnswered(),
    Pause: Paused(),
    Resume: Resumed(),
    AskStop: Ended(EndKind.SHUTDOWN, WHY),
    Kill: Cleared(),
    Remove: Removed(),
    RestartLater: RestartDue(),
    Hold: Released(),
}
"""What each step reports if it goes well."""


def outcome(effect: Effect) -> Seen:
    return OUTCOMES[type(effect)]


def see(row: VmRow, *seen: Seen, held: bool = False) -> VmRow:
    """The row after all of `seen`; the VM must still exist."""
    for each in seen:
        for step in decide(row, each, NOW, held=held):
            assert step.row is not None
            row = step.row
    return row


def settle(row: VmRow | None) -> VmRow | None:
    """Let every step go well until the VM is at rest, or gone."""
    for _ in range(40):
        if row is None or (effect := effect_of(row)) is None:
            return row
        for step in decide(row, outcome(effect), NOW):
            row = step.row
    raise AssertionError(f"{row} does not come to rest")


_REASONS = st.just(WHY)
ANYTHING: st.SearchStrategy[Seen] = st.one_of(
    st.builds(CommandRequest, st.sampled_from(Command), st.sampled_from([0.0, 10.0])),
    st.builds(Woke, st.sampled_from([None, PROCESS])),
    st.just(ImageReady("digest", "volant-tag")),
    st.just(LAUNCHED),
    st.just(AgentAnswered()),
    st.just(Paused()),
    st.builds(Resumed, st.sampled_from([None, WHY])),
    st.builds(StepFailed, _REASONS),
    st.builds(Ended, st.sampled_from(EndKind), _REASONS),
    st.just(Cleared()),
    st.just(Removed()),
    st.just(RestartDue()),
    st.just(Released()),
    st.builds(Leaves, st.sampled_from([LEAVING, msgspec.structs.replace(LEAVING, deciding=True)])),
    st.builds(Stays, st.sampled_from(["m1", "m2"]), st.just("the other host is gone")),
)
"""Whatever may be seen."""
