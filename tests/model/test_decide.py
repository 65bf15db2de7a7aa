"""The decisions about a VM: whatever is seen in whatever order, transitions are legal and every state can be left."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from tests.model.kit import ANYTHING, LAUNCHED, NOW, PROCESS, WHY, create, outcome, see, settle
from volant.model import (
    GUEST_SHUTDOWN,
    TRANSITIONS,
    AskStop,
    Cleared,
    Command,
    CommandRequest,
    Desired,
    Ended,
    EndKind,
    Hold,
    ImageReady,
    Kill,
    Left,
    Pause,
    Paused,
    Phase,
    Problem,
    Reason,
    Released,
    RestartDue,
    RestartLater,
    Resume,
    Resumed,
    Seen,
    Status,
    StepFailed,
    VmRow,
    Woke,
    decide,
    effect_of,
    settled,
)


def running(**fields: object) -> VmRow:
    row = settle(see(create(**fields), Woke(None)))
    assert row is not None
    assert row.status is Status.RUNNING
    return row


def statuses(row: VmRow, *seen: Seen) -> list[str]:
    """The public states passed through, from a chain of observations and the steps that follow."""
    passed: list[str] = []

    def note(after: VmRow | None) -> None:
        status = "gone" if after is None else after.status.value
        if not passed or passed[-1] != status:
            passed.append(status)

    here: VmRow | None = row
    for each in seen:
        assert here is not None
        for step in decide(here, each, NOW):
            here = step.row
            note(here)
    while here is not None and (effect := effect_of(here)) is not None:
        for step in decide(here, outcome(effect), NOW):
            here = step.row
            note(here)
    return passed


def test_create_goes_through_starting_to_running() -> None:
    assert statuses(create(), Woke(None)) == ["starting", "running"]


def test_stop_asks_a_guest_whose_agent_has_answered() -> None:
    row = see(running(), CommandRequest(Command.STOP, 3.0))
    assert effect_of(row) == AskStop("volant-tag", 3.0)
    assert statuses(row) == ["stopping", "stopped"]


def test_stop_without_grace_kills_at_once() -> None:
    assert isinstance(effect_of(see(running(), CommandRequest(Command.STOP, 0.0))), Kill)


def test_a_guest_that_ignores_the_request_is_killed_after_the_grace() -> None:
    row = see(running(), CommandRequest(Command.STOP, 3.0), StepFailed(Reason("grace_over", "did not stop in time")))
    assert isinstance(effect_of(row), Kill)
    assert statuses(row) == ["stopped"]


@pytest.mark.parametrize("command", [Command.STOP, Command.DELETE])
@pytest.mark.parametrize(
    "so_far",
    [(), (ImageReady("d", "volant-tag"),), (ImageReady("d", "volant-tag"), LAUNCHED)],
)
def test_a_command_works_at_every_step_of_a_boot(command: Command, so_far: tuple[Seen, ...]) -> None:
    row = see(create(), Woke(None), *so_far)
    expected = ["stopping", "stopped"] if command is Command.STOP else ["deleting", "gone"]
    if command is Command.STOP or so_far:
        assert not isinstance(effect_of(see(row, CommandRequest(command))), AskStop), "its agent never answered"
    assert statuses(row, CommandRequest(command)) == expected


def test_restart_is_a_new_boot_after_a_stop() -> None:
    assert statuses(running(), CommandRequest(Command.RESTART)) == ["stopping", "stopped", "starting", "running"]


def test_start_while_stopping_starts_after_the_stop() -> None:
    assert statuses(running(), CommandRequest(Command.STOP), CommandRequest(Command.START)) == [
        "stopping", "stopped", "starting", "running",
    ]  # fmt: skip


def test_stop_undoes_a_start_while_stopping() -> None:
    requests = [CommandRequest(command) for command in (Command.STOP, Command.START, Command.STOP)]
    assert statuses(running(), *requests) == ["stopping", "stopped"]


@pytest.mark.parametrize("command", [Command.START])
def test_start_of_a_vm_that_runs_changes_nothing(command: Command) -> None:
    assert decide(running(), CommandRequest(command), NOW) == ()
    assert decide(see(create(), Woke(None)), CommandRequest(command), NOW) == ()


def test_stop_of_a_stopped_vm_changes_nothing() -> None:
    stopped = settle(see(running(), CommandRequest(Command.STOP)))
    assert stopped is not None
    assert decide(stopped, CommandRequest(Command.STOP), NOW) == ()


def test_a_panic_is_a_crash_with_its_reason_and_start_brings_it_back() -> None:
    row = see(running(), Ended(EndKind.PANICKED, Reason("guest_panicked", "the kernel panicked", ("Oops",))))
    assert row.status is Status.CRASHED
    assert row.reason is not None
    assert row.reason.console == ("Oops",)
    assert isinstance(effect_of(row), Kill), "the process goes once the reason is committed"
    assert statuses(row, CommandRequest(Command.START)) == ["crashed", "starting", "running"]


def test_start_of_a_crashed_vm_clears_the_reason() -> None:
    crashed = settle(see(running(), Ended(EndKind.KILLED, WHY)))
    assert crashed is not None
    assert effect_of(crashed) is None
    again = settle(see(crashed, CommandRequest(Command.START)))
    assert again is not None
    assert (again.status, again.reason, again.boots) == (Status.RUNNING, None, 2)


def test_stop_of_a_crashed_vm_gives_stopped() -> None:
    row = see(running(), Ended(EndKind.KILLED, WHY))
    assert statuses(row, CommandRequest(Command.STOP)) == ["crashed", "stopped"]


def test_a_guest_that_powers_itself_off_is_stopped() -> None:
    why = Reason(GUEST_SHUTDOWN, "the guest shut down")
    row = see(running(), Ended(EndKind.SHUTDOWN, why))
    assert statuses(row) == ["stopped"]
    assert row.desired is Desired.STOPPED
    # Who looks later is told that nobody asked for it, until the next boot.
    stopped = see(row, Cleared())
    assert (stopped.status, stopped.reason) == (Status.STOPPED, why)
    assert see(stopped, CommandRequest(Command.START)).reason is None


def test_a_stop_clears_the_reason_of_a_failed_step() -> None:
    row = see(running(), Ended(EndKind.SHUTDOWN, WHY), StepFailed(Reason("unkillable", "it does not end")), Cleared())
    assert (row.status, row.reason) == (Status.STOPPED, None)


def test_a_guest_that_reboots_comes_back() -> None:
    assert statuses(running(), Ended(EndKind.RESET, WHY)) == ["stopping", "stopped", "starting", "running"]


def test_a_failed_image_is_a_crash_without_a_process() -> None:
    row = see(create(), Woke(None), StepFailed(Reason("image_failed", "no mirror answers")))
    assert (row.status, row.phase, row.process) == (Status.CRASHED, Phase.NONE, None)
    assert effect_of(row) is None, "it must not be tried for ever"


def test_a_second_delete_joins_the_first() -> None:
    row = see(running(), CommandRequest(Command.DELETE))
    assert decide(row, CommandRequest(Command.DELETE), NOW) == ()


@pytest.mark.parametrize("command", sorted(set(Command) - {Command.DELETE}))
def test_nothing_else_is_legal_while_deleting(command: Command) -> None:
    with pytest.raises(Problem, match="is being deleted") as caught:
        decide(see(running(), CommandRequest(Command.DELETE)), CommandRequest(command), NOW)
    assert caught.value.status == 409


def test_recover_without_lost_control_is_a_conflict() -> None:
    with pytest.raises(Problem, match="nothing to recover") as caught:
        decide(running(), CommandRequest(Command.RECOVER), NOW)
    assert caught.value.status == 409


def test_an_actor_that_finds_the_process_changes_nothing() -> None:
    assert decide(running(), Woke(PROCESS), NOW) == ()


def test_an_actor_that_finds_no_process_reports_a_crash() -> None:
    row = see(running(), Woke(None))
    assert row.status is Status.CRASHED
    assert row.reason is not None
    assert row.reason.code == "hypervisor_gone"


def test_a_restart_policy_backs_off_and_gives_up() -> None:
    row: VmRow | None = running(restart_policy="on-failure")
    delays = []
    for _ in range(20):
        assert row is not None
        row = see(row, Ended(EndKind.PANICKED, WHY), Cleared())
        effect = effect_of(row)
        if effect is None:
            break
        assert isinstance(effect, RestartLater)
        delays.append(effect.delay_s)
        row = settle(see(row, RestartDue()))
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert row is not None
    assert (row.status, row.restarts) == (Status.CRASHED, 10)


def test_on_failure_leaves_a_clean_shutdown_alone_and_always_does_not() -> None:
    assert statuses(running(restart_policy="on-failure"), Ended(EndKind.SHUTDOWN, WHY)) == ["stopping", "stopped"]
    assert statuses(running(restart_policy="always"), Ended(EndKind.SHUTDOWN, WHY)) == [
        "stopping", "stopped", "starting", "running",
    ]  # fmt: skip


def test_a_command_undoes_an_automatic_restart() -> None:
    row = see(running(restart_policy="always"), Ended(EndKind.PANICKED, WHY), Cleared())
    assert isinstance(effect_of(row), RestartLater)
    row = see(row, CommandRequest(Command.STOP))
    assert (row.status, effect_of(row)) == (Status.STOPPED, None)


def paused(**fields: object) -> VmRow:
    row = settle(see(running(**fields), CommandRequest(Command.PAUSE)))
    assert row is not None
    assert (row.status, row.desired, row.process) == (Status.PAUSED, Desired.PAUSED, PROCESS)
    return row


def test_pause_and_resume_keep_the_process() -> None:
    assert statuses(running(), CommandRequest(Command.PAUSE)) == ["running", "paused"]
    assert statuses(paused(), CommandRequest(Command.RESUME)) == ["paused", "running"]
    assert settled(paused())
    assert not settled(see(running(), CommandRequest(Command.PAUSE)))
    assert decide(paused(), CommandRequest(Command.PAUSE), NOW) == ()
    assert decide(running(), CommandRequest(Command.RESUME), NOW) == ()


def test_start_of_a_paused_vm_resumes_it() -> None:
    assert statuses(paused(), CommandRequest(Command.START)) == ["paused", "running"]


def test_a_boot_that_should_end_paused_runs_first() -> None:
    row = see(create(), Woke(None), CommandRequest(Command.PAUSE))
    assert (row.status, row.desired) == (Status.STARTING, Desired.PAUSED)
    assert statuses(row)[-2:] == ["running", "paused"]
    assert statuses(row, CommandRequest(Command.RESUME))[-1] == "running"
    assert statuses(row, CommandRequest(Command.START))[-1] == "running"


@pytest.mark.parametrize("command", [Command.PAUSE, Command.RESUME])
def test_a_vm_without_a_guest_can_be_neither_paused_nor_resumed(command: Command) -> None:
    stopping = see(running(), CommandRequest(Command.STOP))
    stopped = settle(stopping)
    crashed = settle(see(running(), Ended(EndKind.KILLED, WHY)))
    for row in (stopping, stopped, crashed):
        assert row is not None
        with pytest.raises(Problem, match=f"'demo' is {row.status}") as caught:
            decide(row, CommandRequest(command), NOW)
        assert (caught.value.status, caught.value.code) == (409, "vm-not-running")
        assert caught.value.hint


def test_undoing_a_pause_or_a_resume_runs_the_opposite_step() -> None:
    # The step that was cancelled may have had its effect already.
    back = see(running(), CommandRequest(Command.PAUSE), CommandRequest(Command.RESUME))
    assert isinstance(effect_of(back), Resume)
    assert statuses(back) == ["running"]
    again = see(paused(), CommandRequest(Command.RESUME), CommandRequest(Command.PAUSE))
    assert isinstance(effect_of(again), Pause)
    assert statuses(again) == ["paused"]


def test_a_failed_pause_is_undone_with_a_reason() -> None:
    row = see(running(), CommandRequest(Command.PAUSE), StepFailed(Reason("pause_failed", "QEMU does not answer")))
    assert isinstance(effect_of(row), Resume)
    done = settle(row)
    assert done is not None
    assert (done.status, done.desired) == (Status.RUNNING, Desired.RUNNING)
    assert done.reason is not None
    assert done.reason.code == "pause_failed"
    assert see(done, CommandRequest(Command.PAUSE), Paused()).reason is None


def test_a_failed_resume_is_retried_and_can_be_stopped() -> None:
    row = see(paused(), CommandRequest(Command.RESUME), StepFailed(Reason("resume_failed", "QEMU does not answer")))
    assert (row.status, effect_of(row)) == (Status.PAUSED, Resume("volant-tag"))
    assert row.reason is not None
    assert see(row, Resumed()).reason is None
    assert statuses(row, CommandRequest(Command.STOP)) == ["stopping", "stopped"]


def test_a_clock_that_was_not_set_is_the_reason() -> None:
    why = Reason("clock_not_set", "the agent does not answer")
    assert see(paused(), CommandRequest(Command.RESUME), Resumed(why)).reason == why


def test_stop_and_delete_ask_a_paused_guest_too() -> None:
    assert isinstance(effect_of(see(paused(), CommandRequest(Command.STOP))), AskStop)
    assert statuses(paused(), CommandRequest(Command.STOP)) == ["stopping", "stopped"]
    assert statuses(paused(), CommandRequest(Command.DELETE)) == ["deleting", "gone"]
    assert isinstance(effect_of(see(paused(), CommandRequest(Command.STOP, 0.0))), Kill)


def test_restart_of_a_paused_vm_runs() -> None:
    assert statuses(paused(), CommandRequest(Command.RESTART)) == ["stopping", "stopped", "starting", "running"]


def test_an_automatic_boot_of_a_paused_vm_ends_paused() -> None:
    again = ["stopping", "stopped", "starting", "running", "paused"]
    assert statuses(paused(), Woke(None, rebooted=True)) == again
    assert statuses(paused(), CommandRequest(Command.RESTART, aside=True)) == again
    assert statuses(see(running(), CommandRequest(Command.PAUSE)), Ended(EndKind.RESET, WHY)) == again
    crashed = ["crashed", "starting", "running", "paused"]
    assert statuses(paused(restart_policy="on-failure"), Ended(EndKind.KILLED, WHY)) == crashed


def test_a_paused_vm_whose_process_dies_has_crashed() -> None:
    assert statuses(paused(), Ended(EndKind.KILLED, WHY)) == ["crashed"]
    assert statuses(paused(), Woke(None)) == ["crashed"]


def test_an_actor_that_starts_in_a_pause_or_a_resume_continues_it() -> None:
    for row in (see(running(), CommandRequest(Command.PAUSE)), see(paused(), CommandRequest(Command.RESUME)), paused()):
        assert decide(row, Woke(PROCESS), NOW) == ()
        assert statuses(row, Woke(None)) == ["crashed"]


def due(row: VmRow) -> None:
    """Its boot waits for the daemon, and for nothing else."""
    assert isinstance(effect_of(row), Hold)
    assert not settled(row)
    assert see(row, Released(), held=True) == row
    released = see(row, Released())
    assert (released.status, released.phase) == (Status.STARTING, Phase.IMAGE)


def test_boots_wait_while_the_daemon_drains() -> None:
    made = see(create(), Woke(None), held=True)
    assert made.status is Status.PENDING
    due(made)

    # Stopped for the time: a restart whose second half waits.
    aside = see(running(), CommandRequest(Command.RESTART), Ended(EndKind.SHUTDOWN, WHY), Cleared(), held=True)
    assert (aside.status, aside.desired) == (Status.STOPPED, Desired.RUNNING)
    due(aside)
    due(see(aside, Woke(None), held=True))
    due(see(paused(), CommandRequest(Command.RESTART, aside=True), Ended(EndKind.SHUTDOWN, WHY), Cleared(), held=True))

    due(see(running(), Ended(EndKind.RESET, WHY), Cleared(), held=True))
    due(see(running(), Woke(None, rebooted=True), Cleared(), held=True))
    crashed = see(running(restart_policy="on-failure"), Ended(EndKind.KILLED, WHY), Cleared(), RestartDue(), held=True)
    assert (crashed.status, crashed.restarts) == (Status.CRASHED, 1)
    due(crashed)


def test_a_vm_that_waits_for_the_end_of_a_drain_can_be_stopped_and_deleted() -> None:
    aside = see(running(), CommandRequest(Command.RESTART), Ended(EndKind.SHUTDOWN, WHY), Cleared(), held=True)
    stopped = see(aside, CommandRequest(Command.STOP), held=True)
    assert (stopped.status, stopped.desired, effect_of(stopped)) == (Status.STOPPED, Desired.STOPPED, None)
    assert statuses(aside, CommandRequest(Command.DELETE)) == ["deleting", "gone"]
    made = see(create(), Woke(None), held=True)
    assert see(made, CommandRequest(Command.STOP), held=True).status is Status.STOPPED


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.one_of(ANYTHING, st.none()), st.booleans()), max_size=25),
    st.sampled_from(["never", "on-failure", "always"]),
)
def test_any_input_in_any_order_keeps_to_the_transitions_and_allows_a_delete(
    chain: list[tuple[Seen | None, bool]], policy: str
) -> None:
    """None in the chain stands for: the step under way goes well; true for: the daemon drains."""
    row: VmRow | None = create(restart_policy=policy)
    for seen, held in chain:
        assert row is not None
        if seen is None:
            effect = effect_of(row)
            if effect is None:
                continue
            seen = outcome(effect)
        try:
            # No boot begins while it is not decided where it goes on.
            steps = decide(row, seen, NOW, held=held or row.leaving is not None)
        except Problem:
            continue
        before: VmRow = row
        for step in steps:
            assert (
                step.row is None or (before.status, step.row.status) in TRANSITIONS or before.status is step.row.status
            )
            assert step.row is None or not held or before.status is step.row.status or step.row.phase is not Phase.IMAGE
            row = step.row
            if row is None:
                return
            before = row
        assert row.process is None or row.tag, "a process without a tag has no owner"
    assert row is not None
    ends = CommandRequest(Command.DELETE) if row.leaving is None else Left("h2")
    for step in decide(row, ends, NOW):
        row = step.row
    assert settle(row) is None


def test_settled_means_that_the_status_stays() -> None:
    crashed = see(running(), Ended(EndKind.KILLED, WHY))
    assert settled(crashed), "clearing up changes no status"
    assert not settled(see(crashed, CommandRequest(Command.START)))
    assert not settled(see(crashed, CommandRequest(Command.STOP)))
    assert not settled(see(running(restart_policy="always"), Ended(EndKind.KILLED, WHY)))
    assert not settled(see(running(), CommandRequest(Command.RESTART)))
    assert settled(running())
