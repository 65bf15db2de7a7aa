"""Boots that clone a template: one that fails becomes a cold boot, once, with the reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from tests.model.kit import ANYTHING, LAUNCHED, NOW, PROCESS, WHY, create, outcome, see, settle
from volant.model import (
    AgentAnswered,
    Cleared,
    Command,
    CommandRequest,
    Ended,
    EndKind,
    ImageReady,
    Kill,
    Left,
    Phase,
    PrepareImage,
    Problem,
    Seen,
    Status,
    StepFailed,
    VmRow,
    Woke,
    decide,
    effect_of,
)

CLONE = ImageReady("digest", "volant-tag", template="t")


def cloning(*seen: Seen, **fields: object) -> VmRow:
    return see(create(**fields), Woke(None), CLONE, *seen)


def test_a_view_has_the_kind_of_the_last_boot() -> None:
    assert create().view.booted_from is None
    clone = cloning(LAUNCHED, AgentAnswered()).view
    assert (clone.status, clone.booted_from, clone.boot) == (Status.RUNNING, "template", "auto")
    cold = settle(see(create(boot="cold"), Woke(None)))
    assert cold is not None
    assert (cold.view.booted_from, cold.view.boot) == ("cold", "cold")


@pytest.mark.parametrize("so_far", [(), (LAUNCHED,)])
@pytest.mark.parametrize("trouble", [StepFailed(WHY), Ended(EndKind.KILLED, WHY)])
def test_a_cold_boot_follows_a_failed_clone(so_far: tuple[Seen, ...], trouble: Seen) -> None:
    row = see(cloning(*so_far), trouble)
    assert (row.status, effect_of(row)) == (Status.STARTING, Kill("volant-tag"))
    # The end of the process that is being killed is no news.
    assert see(row, Ended(EndKind.KILLED, WHY)) == row
    row = see(row, Cleared())
    assert (row.status, effect_of(row)) == (Status.STARTING, PrepareImage("7.1", cold=True))
    assert (row.tag, row.process, row.template) == ("", None, None)
    after = settle(row)
    assert after is not None
    shown = after.view
    assert (shown.status, shown.booted_from, shown.fallback, shown.boots) == (Status.RUNNING, "cold", WHY, 2)
    again = settle(see(after, CommandRequest(Command.RESTART)))
    assert again is not None
    assert again.fallback is None, "it is about one boot"


def test_a_failed_cold_boot_after_a_clone_is_a_crash() -> None:
    row = see(cloning(), StepFailed(WHY), Cleared(), ImageReady("digest", "volant-tag"), StepFailed(WHY))
    assert row.status is Status.CRASHED


def test_boot_template_excludes_a_cold_boot() -> None:
    row = see(cloning(boot="template"), StepFailed(WHY))
    assert (row.status, row.reason) == (Status.CRASHED, WHY)


def test_a_clone_that_is_not_killed_is_killed_again() -> None:
    row = see(cloning(LAUNCHED), StepFailed(WHY))
    row = see(row, StepFailed(WHY))
    assert (row.status, row.phase) == (Status.STARTING, Phase.KILL)
    assert see(row, Woke(PROCESS)) == row


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(ANYTHING, st.none(), st.just(CLONE), st.just(LAUNCHED)), max_size=25),
    st.sampled_from(["auto", "cold", "template"]),
)
def test_any_input_in_any_order_leaves_no_clone(chain: list[Seen | None], boot: str) -> None:
    row: VmRow | None = create(boot=boot)
    for seen in chain:
        assert row is not None
        if seen is None:
            effect = effect_of(row)
            if effect is None:
                continue
            seen = CLONE if isinstance(effect, PrepareImage) and not effect.cold else outcome(effect)
        try:
            for step in decide(row, seen, NOW, held=row.leaving is not None):
                row = step.row
        except Problem:
            continue
        if row is None:
            return
        assert row.process is None or row.tag
    assert row is not None
    for step in decide(row, CommandRequest(Command.DELETE) if row.leaving is None else Left("h2"), NOW):
        row = step.row
    assert settle(row) is None
