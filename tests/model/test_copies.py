"""A copy continues from a checkpoint in its first boot, or fails. Later boots are ordinary."""

from __future__ import annotations

import msgspec
import pytest

from tests.model.kit import LAUNCHED, NOW, WHY, create, see
from volant.model import (
    AgentAnswered,
    Cleared,
    Command,
    CommandRequest,
    Ended,
    EndKind,
    ForkVm,
    ImageReady,
    Origin,
    PrepareImage,
    Problem,
    Seen,
    Status,
    StepFailed,
    VmRow,
    Woke,
    check_copyable,
    copied_row,
    effect_of,
    fork_names,
    settled,
    waits_for,
)

READY = ImageReady("digest", "volant-tag", template="fork-a", origin=Origin("fork", "demo", 7, paused_ms=3.5))


def copy(*seen: Seen, **fields: object) -> VmRow:
    vm = msgspec.structs.replace(create(**fields), image="digest")
    row = copied_row(vm, vm_id=8, name="copy", origin=Origin("fork", "demo", 7), checkpoint="fork-a", now=NOW)
    return see(row, Woke(None), *seen)


def test_a_copy_has_an_origin_and_needs_no_checkpoint_once_it_runs() -> None:
    row = copy(READY, LAUNCHED)
    assert waits_for(row, "fork-a")
    row = see(row, AgentAnswered())
    shown = row.view
    assert (shown.status, shown.booted_from, row.checkpoint) == (Status.RUNNING, "fork", None)
    assert shown.origin == Origin("fork", "demo", 7, paused_ms=3.5)
    assert not waits_for(row, "fork-a")
    again = see(row, CommandRequest(Command.RESTART, grace_s=0), Cleared())
    assert effect_of(again) == PrepareImage("8.2")
    assert (again.template, again.checkpoint) == (None, None)


def test_the_workload_of_a_copy_waits_for_a_client_as_that_of_its_origin_does() -> None:
    """Also if the copy was stopped before it ran, so that it continues in its second boot."""
    row = msgspec.structs.replace(copy(), attach=True)
    row = see(row, StepFailed(WHY), Cleared(), CommandRequest(Command.START), READY, LAUNCHED)
    assert (row.generation, row.waits_for_client) == (2, True)
    copies = copied_row(row, vm_id=9, name="next", origin=Origin("fork", "copy", 8), checkpoint="fork-b", now=NOW)
    assert copies.attach
    again = see(row, AgentAnswered(), CommandRequest(Command.RESTART, grace_s=0), Cleared())
    assert not again.waits_for_client


@pytest.mark.parametrize("so_far", [(), (READY,), (READY, LAUNCHED)])
@pytest.mark.parametrize("trouble", [StepFailed(WHY), Ended(EndKind.KILLED, WHY)])
@pytest.mark.parametrize("policy", ["never", "on-failure", "always"])
def test_a_failed_copy_has_crashed_and_does_not_boot_cold(so_far: tuple[Seen, ...], trouble: Seen, policy: str) -> None:
    row = see(copy(*so_far, restart_policy=policy), trouble, Cleared())
    assert (row.status, row.reason, row.fallback) == (Status.CRASHED, WHY, None)
    assert (effect_of(row), settled(row)) == (None, True)
    # Whoever asks for it once more gets the copy, or the reason why not.
    row = see(row, CommandRequest(Command.START))
    assert (row.status, row.checkpoint) == (Status.STARTING, "fork-a")


def test_a_vm_between_two_states_can_not_be_copied() -> None:
    running = see(create(), Woke(None), ImageReady("digest", "volant-tag"), LAUNCHED, AgentAnswered())
    check_copyable(running)
    for command in (Command.STOP, Command.RESTART, Command.PAUSE, Command.DELETE):
        with pytest.raises(Problem) as refused:
            check_copyable(see(running, CommandRequest(command)))
        assert (refused.value.status, refused.value.code) == (409, "vm-not-running")


def test_a_vm_with_a_directory_of_the_host_is_not_copied() -> None:
    """Neither alone nor with its volumes: its memory has parts of files that the host changes."""
    running = see(
        create(volumes=("/srv/files:/files",)),
        Woke(None), ImageReady("digest", "volant-tag"), LAUNCHED, AgentAnswered(),
    )  # fmt: skip
    assert running.status is Status.RUNNING
    for volumes in (False, True):
        with pytest.raises(Problem, match=r"'demo' mounts /srv/files of the host") as refused:
            check_copyable(running, volumes=volumes)
        assert (refused.value.status, refused.value.code) == (409, "host-directory")
    check_copyable(msgspec.structs.replace(running, directories=()))


def test_names_of_forks_are_free_and_never_too_long() -> None:
    taken = frozenset({"a-fork-1", "a-fork-3"})
    assert fork_names(ForkVm(count=3), "a", taken) == ("a-fork-2", "a-fork-4", "a-fork-5")
    (name,) = fork_names(ForkVm(), "x" * 63, frozenset())
    assert (len(name), name[-7:]) == (63, "-fork-1")
