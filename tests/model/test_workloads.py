"""A VM stops with its workload (`on_exit`), and what happens to a workload has events."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from tests.model.kit import ANYTHING, NOW, outcome, see, settle
from volant.model import (
    GUEST_SHUTDOWN,
    TRANSITIONS,
    WORKLOAD_EXITED,
    WORKLOAD_FAILED,
    AgentAnswered,
    AskStop,
    Cleared,
    Command,
    CommandRequest,
    CreateVm,
    Desired,
    Ended,
    EndKind,
    EventType,
    ImageReady,
    Kill,
    Manifest,
    Origin,
    Paused,
    Problem,
    Reason,
    RestartDue,
    RestartLater,
    Resumed,
    Seen,
    Status,
    StepFailed,
    VmRow,
    Woke,
    Workload,
    WorkloadChanged,
    WorkloadView,
    check_create,
    copied_row,
    decide,
    effect_of,
    new_row,
    readiness,
    settled,
    workload_events,
)
from volant.vm._machine_spec import workload_spec

RUNS = WorkloadView("healthy", pid=5)
EXITED = WorkloadView("exited", exit_code=0)
FAILED = WorkloadView("failed", exit_code=3, error="it ended with exit code 3")
MISSING = WorkloadView("failed", error="there is no program x")
SHUT_DOWN = Ended(EndKind.SHUTDOWN, Reason(GUEST_SHUTDOWN, "the guest shut down"))
GONE = (SHUT_DOWN, Cleared())


def create(on_exit: str = "stop", **fields: object) -> VmRow:
    manifest = Manifest(name="job", workload=msgspec.convert({"entrypoint": ["x"], "on_exit": on_exit}, Workload))
    request = msgspec.convert({"name": "demo", "plugin": "job", **fields}, CreateVm)
    return new_row(request, manifest, vm_id=7, now=NOW)


def running(on_exit: str = "stop", **fields: object) -> VmRow:
    row = settle(see(create(on_exit, **fields), Woke(None)))
    assert row is not None
    assert row.status is Status.RUNNING
    return see(row, WorkloadChanged(RUNS))


def reason_of(row: VmRow) -> tuple[str, str] | None:
    return None if row.reason is None else (row.reason.code, row.reason.message)


def test_a_vm_stops_once_its_workload_has_exited() -> None:
    row = see(running(), WorkloadChanged(EXITED))
    assert (row.status, row.desired) == (Status.STOPPING, Desired.STOPPED)
    assert isinstance(effect_of(row), AskStop), "the rest of the guest shuts down cleanly"
    row = see(row, *GONE)
    assert (row.status, row.process, effect_of(row)) == (Status.STOPPED, None, None)
    assert settled(row)
    assert reason_of(row) == (WORKLOAD_EXITED, "the workload has ended with exit code 0")
    assert row.view.workload == EXITED


@pytest.mark.parametrize(
    ("workload", "text"),
    [
        (FAILED, "the workload has failed: it ended with exit code 3"),
        (MISSING, "the workload has failed: there is no program x"),
    ],
)
def test_a_vm_whose_workload_failed_stops_with_a_reason(workload: WorkloadView, text: str) -> None:
    row = see(running(), WorkloadChanged(workload), *GONE)
    assert (row.status, row.desired, reason_of(row)) == (Status.STOPPED, Desired.STOPPED, (WORKLOAD_FAILED, text))
    assert row.view.workload == workload


def test_the_next_boot_forgets_how_the_last_one_ended() -> None:
    row = see(running(), WorkloadChanged(FAILED), *GONE, CommandRequest(Command.START))
    assert (row.status, row.reason, row.workload) == (Status.STARTING, None, None)


def launched(row: VmRow) -> Seen:
    """Returns what comes of the step that a VM needs."""
    effect = effect_of(row)
    assert effect is not None
    return outcome(effect)


@pytest.mark.parametrize("workload", [EXITED, FAILED])
def test_by_default_a_vm_outlives_its_workload(workload: WorkloadView) -> None:
    row = see(running("keep"), WorkloadChanged(workload))
    assert (row.status, effect_of(row), row.view.workload) == (Status.RUNNING, None, workload)
    assert see(row, CommandRequest(Command.STOP), *GONE).view.workload is None


def test_a_workload_that_ends_before_the_vm_runs_stops_it_then() -> None:
    row = see(create(), Woke(None), ImageReady("digest", "volant-tag"))
    row = see(row, launched(row), WorkloadChanged(EXITED))
    assert row.status is Status.STARTING
    steps = decide(row, AgentAnswered(), NOW)
    assert [step.row.status for step in steps if step.row] == [Status.RUNNING, Status.STOPPING]


def test_a_paused_vm_stays_paused_and_stops_when_it_is_resumed() -> None:
    row = see(running(), CommandRequest(Command.PAUSE), WorkloadChanged(EXITED), Paused())
    assert (row.status, effect_of(row)) == (Status.PAUSED, None)
    row = see(row, CommandRequest(Command.RESUME), Resumed())
    assert (row.status, row.desired) == (Status.STOPPING, Desired.STOPPED)


@pytest.mark.parametrize("workload", [EXITED, FAILED, MISSING])
def test_a_vm_that_is_not_kept_is_deleted_with_its_workload(workload: WorkloadView) -> None:
    row = see(running("delete"), WorkloadChanged(workload))
    assert (row.status, row.reason is None) == (Status.DELETING, False)
    assert readiness(row) == ("met" if workload is EXITED else "failed")
    assert isinstance(effect_of(row), Kill), "nothing that its guest could still write is kept"
    assert settle(row) is None


def test_a_vm_that_is_not_kept_unmounts_what_outlives_it() -> None:
    row = see(running("delete", volumes=["data:/data"]), WorkloadChanged(EXITED))
    assert isinstance(effect_of(row), AskStop)
    assert settle(row) is None


@pytest.mark.parametrize("command", [Command.STOP, Command.DELETE])
def test_a_vm_that_is_not_kept_is_deleted_when_it_is_stopped(command: Command) -> None:
    row = see(running("delete"), CommandRequest(command))
    assert settle(row) is None
    steps = decide(see(row, SHUT_DOWN), Cleared(), NOW)
    assert [step.row.status for step in steps if step.row] == [Status.DELETING], "nobody sees it stopped"
    assert settle(see(create("delete"), CommandRequest(command))) is None
    assert settle(see(running("delete"), SHUT_DOWN)) is None


def test_a_vm_that_is_not_kept_stays_while_it_is_to_run_again_or_has_crashed() -> None:
    row = see(running("delete", restart_policy="on-failure"), WorkloadChanged(FAILED), *GONE)
    assert (row.status, isinstance(effect_of(row), RestartLater)) == (Status.STOPPED, True)
    row = see(running("delete"), CommandRequest(Command.RESTART), *GONE)
    assert row.status is Status.STARTING
    row = see(running("delete"), Ended(EndKind.GONE, Reason("gone", "killed")), Cleared())
    assert (row.status, effect_of(row)) == (Status.CRASHED, None)
    assert settle(see(row, CommandRequest(Command.STOP))) is None


def test_a_workload_waits_for_its_client_in_the_first_boot_only() -> None:
    row = msgspec.structs.replace(running(), attach=True)
    assert row.waits_for_client
    assert workload_spec(row) == {**(workload_spec(running()) or {}), "attach": True}
    copy = copied_row(row, vm_id=8, name="copy", origin=Origin("fork", "demo", 7), checkpoint="fork-1", now=NOW)
    assert workload_spec(copy) == workload_spec(row), "the copy's agent refuses another one"
    again = settle(see(row, CommandRequest(Command.RESTART)))
    assert again is not None
    assert not again.waits_for_client
    copy = copied_row(again, vm_id=8, name="copy", origin=Origin("fork", "demo", 7), checkpoint="fork-1", now=NOW)
    assert workload_spec(copy) == workload_spec(again)


def test_a_copy_of_a_vm_whose_program_was_not_started_starts_none() -> None:
    row = msgspec.structs.replace(running(), start_workload=False)
    copy = copied_row(row, vm_id=8, name="copy", origin=Origin("fork", "demo", 7), checkpoint="fork-1", now=NOW)
    assert workload_spec(copy) is None


@pytest.mark.parametrize(
    "fields",
    [{"attach": True}, {"on_exit": "delete"}, {"image": "x", "attach": True, "start_workload": False}],
)
def test_what_is_only_for_the_program_of_an_image(fields: dict[str, object]) -> None:
    with pytest.raises(Problem) as refused:
        check_create(msgspec.convert({"name": "demo", **fields}, CreateVm))
    assert (refused.value.status, refused.value.field) == (422, "on_exit" if "on_exit" in fields else "attach")


@pytest.mark.parametrize(
    ("policy", "workload", "restarts"),
    [
        ("never", EXITED, False),
        ("never", FAILED, False),
        ("on-failure", EXITED, False),
        ("on-failure", FAILED, True),
        ("always", EXITED, True),
        ("always", FAILED, True),
    ],
)
def test_the_restart_policy_decides_what_follows(policy: str, workload: WorkloadView, restarts: bool) -> None:
    row = see(running(restart_policy=policy), WorkloadChanged(workload), *GONE)
    assert row.status is Status.STOPPED
    assert isinstance(effect_of(row), RestartLater) is restarts
    assert (row.desired is Desired.RUNNING) is restarts
    assert settled(row) is not restarts


def test_a_failing_workload_is_restarted_with_a_back_off_and_given_up() -> None:
    row = running(restart_policy="on-failure")
    for _ in range(10):
        row = see(row, WorkloadChanged(FAILED), *GONE, RestartDue())
        after = settle(row)
        assert after is not None
        row = after
    row = see(row, WorkloadChanged(FAILED), *GONE)
    assert (row.status, row.restarts, effect_of(row), readiness(row)) == (Status.STOPPED, 10, None, "failed")
    assert settled(row)


def test_a_restart_by_a_client_is_not_undone_by_the_end_of_the_workload() -> None:
    row = see(running(), WorkloadChanged(EXITED), CommandRequest(Command.RESTART))
    after = settle(row)
    assert after is not None
    assert (after.status, after.boots) == (Status.RUNNING, 2)
    again = see(running(), CommandRequest(Command.RESTART), WorkloadChanged(EXITED), *GONE)
    assert (again.status, again.workload) == (Status.STARTING, None)


def test_what_a_guest_reports_while_it_shuts_down_does_not_count() -> None:
    row = see(running(), CommandRequest(Command.STOP), WorkloadChanged(FAILED), *GONE)
    assert (row.status, row.reason, row.view.workload) == (Status.STOPPED, None, None)


def test_a_guest_that_does_not_shut_down_is_killed_and_keeps_its_reason() -> None:
    row = see(running(), WorkloadChanged(EXITED), StepFailed(Reason("grace", "it did not end")), Cleared())
    assert (row.status, reason_of(row)) == (
        Status.STOPPED,
        (WORKLOAD_EXITED, "the workload has ended with exit code 0"),
    )


def test_ready_means_healthy_or_ended_well() -> None:
    row = running()
    assert readiness(row) == "met"
    assert readiness(see(row, WorkloadChanged(WorkloadView("starting", pid=5)))) is None
    assert readiness(see(running("keep"), WorkloadChanged(EXITED))) == "met"
    assert readiness(see(running("keep"), WorkloadChanged(FAILED))) == "failed"
    for workload, found in ((EXITED, "met"), (FAILED, "failed"), (MISSING, "failed")):
        stopping = see(row, WorkloadChanged(workload))
        assert (readiness(stopping), readiness(see(stopping, *GONE))) == (found, found)
    assert readiness(see(row, CommandRequest(Command.STOP), *GONE)) is None


def test_ready_is_not_decided_while_another_boot_is_due() -> None:
    tried_again = see(running(restart_policy="on-failure"), WorkloadChanged(FAILED))
    assert (readiness(tried_again), readiness(see(tried_again, *GONE))) == (None, None)
    assert readiness(see(running(), WorkloadChanged(EXITED), CommandRequest(Command.START))) is None


# Events


def events(*states: WorkloadView | None) -> list[str]:
    """The types of the events of a VM that is up, whose agent reports these states in order."""
    row = running("keep")
    row = msgspec.structs.replace(row, workload=None)
    found: list[str] = []
    for state in states:
        [step] = decide(row, WorkloadChanged(state), NOW)
        found += [kind.value.removeprefix("WORKLOAD_") for kind, _ in workload_events(row, step.row)]
        assert step.row is not None
        row = step.row
    return found


STARTING = WorkloadView("starting")
UNHEALTHY = WorkloadView("unhealthy", error="no answer", pid=5)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([RUNS], ["STARTED", "READY"]),
        ([STARTING, RUNS], ["STARTED", "READY"]),
        ([WorkloadView("starting", pid=5), RUNS], ["STARTED", "READY"]),
        ([RUNS, UNHEALTHY, RUNS], ["STARTED", "READY", "READY"]),
        ([RUNS, EXITED], ["STARTED", "READY", "EXITED"]),
        ([EXITED], ["STARTED", "EXITED"]),
        ([FAILED], ["STARTED", "FAILED"]),
        ([WorkloadView("failed", signal=9, error="it ended with signal 9")], ["STARTED", "FAILED"]),
        ([STARTING, MISSING], ["FAILED"]),
        ([RUNS, WorkloadView("healthy", pid=6, restarts=1)], ["STARTED", "READY", "STARTED", "READY"]),
        ([RUNS, WorkloadView("healthy", pid=6)], ["STARTED", "READY", "STARTED", "READY"]),
        ([RUNS, None], ["STARTED", "READY"]),
    ],
    ids=str,
)
def test_each_end_and_each_run_of_a_workload_has_events(states: list[WorkloadView | None], expected: list[str]) -> None:
    assert events(*states) == expected


def test_texts_of_events_say_why() -> None:
    row = running("keep")
    [(kind, text)] = workload_events(row, see(row, WorkloadChanged(FAILED)))
    assert (kind, text) == (EventType.WORKLOAD_FAILED, "the workload has failed: it ended with exit code 3")


def test_events_of_the_workload_follow_the_start_of_its_vm() -> None:
    row = see(create(), Woke(None), ImageReady("digest", "volant-tag"))
    row = see(row, launched(row))
    reported = see(row, WorkloadChanged(RUNS))
    assert workload_events(row, reported) == []
    assert [kind for kind, _ in workload_events(reported, see(reported, AgentAnswered()))] == [
        EventType.WORKLOAD_STARTED,
        EventType.WORKLOAD_READY,
    ]
    assert workload_events(None, create()) == []
    assert workload_events(running(), None) == []
    paused = see(running(), CommandRequest(Command.PAUSE), Paused())
    assert workload_events(running(), paused) == []


WORKLOADS = st.sampled_from([None, STARTING, RUNS, UNHEALTHY, EXITED, FAILED, MISSING])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.one_of(ANYTHING, st.none(), st.builds(WorkloadChanged, WORKLOADS)), st.booleans()), max_size=25
    ),
    st.sampled_from(["never", "on-failure", "always"]),
    st.sampled_from(["stop", "delete"]),
)
def test_any_input_in_any_order_keeps_to_the_transitions(
    chain: list[tuple[Seen | None, bool]], policy: str, on_exit: str
) -> None:
    """None in the chain stands for: the step under way goes well; true for: the daemon drains."""
    row = create(on_exit, restart_policy=policy)
    for seen, held in chain:
        if seen is None:
            effect = effect_of(row)
            if effect is None:
                continue
            seen = outcome(effect)
        try:
            steps = decide(row, seen, NOW, held=held)
        except Problem:
            continue
        for step in steps:
            if step.row is None:
                return
            assert row.status is step.row.status or (row.status, step.row.status) in TRANSITIONS
            assert len(workload_events(row, step.row)) <= 2
            row = step.row
        # A finished VM at rest has one answer to whoever waits for it.
        if row.status is Status.STOPPED and row.is_finished and settled(row):
            assert readiness(row) is not None
            assert not row.is_removed_at_rest
        assert not (row.status is Status.RUNNING and effect_of(row) is None and row.is_finished)
