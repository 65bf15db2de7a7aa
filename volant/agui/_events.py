"""The used part of AG-UI 1.0, and the conversion of VM events to AG-UI events. No I/O.

AG-UI has runs, one at a time on a connection. VMs overlap, so they can't each be a run. For all VMs the connection is
the run, and its state is the list of VMs (`Overview`). For one VM each of its boots is a run (`Boots`). Only `Boots`
has steps and messages: all open ones must be closed before a run ends, and a client that resumes an overview would have
to learn which ones it left open.

Optional fields without a value are left out, as AG-UI's clients fail at a `null`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from volant.model import Event, EventType, Phase, Status, VmRow, VmView

PROTOCOL_VERSION = "1.0"

_UP = frozenset({Status.STARTING, Status.RUNNING, Status.PAUSED, Status.STOPPING, Status.DELETING})


class RunAgentInput(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The body of `POST /api/v1/agui`. Unknown fields are allowed, as AG-UI may add some. Most are not used here."""

    thread_id: str
    run_id: str
    messages: list[Any] = []
    state: Any = None
    tools: Any = None
    context: Any = None
    forwarded_props: Any = None
    parent_run_id: str | None = None
    protocol_version: str | None = None


class _AguiEvent(msgspec.Struct, frozen=True, rename="camel", tag_field="type"):
    pass


class RunStarted(_AguiEvent, frozen=True, tag="RUN_STARTED"):
    """A run begins."""

    thread_id: str
    run_id: str
    protocol_version: str = PROTOCOL_VERSION


class RunFinished(_AguiEvent, frozen=True, tag="RUN_FINISHED"):
    """A run ends without an error."""

    thread_id: str
    run_id: str


class RunError(_AguiEvent, frozen=True, tag="RUN_ERROR"):
    """A run ends with an error: the VM crashed."""

    message: str
    code: str


class StateSnapshot(_AguiEvent, frozen=True, tag="STATE_SNAPSHOT"):
    """`{"vms": {name: VM}}`."""

    snapshot: dict[str, Any]


class PatchOperation(msgspec.Struct, frozen=True):
    """A JSON Patch operation (RFC 6902)."""

    op: Literal["add", "replace", "remove"]
    path: str
    value: Any | UnsetType = UNSET


class StateDelta(_AguiEvent, frozen=True, tag="STATE_DELTA"):
    """Changes of the state."""

    delta: tuple[PatchOperation, ...]


class Custom(_AguiEvent, frozen=True, tag="CUSTOM"):
    """`volant.vm.<type>`: an event of a VM, unchanged."""

    name: str
    value: Event


class StepStarted(_AguiEvent, frozen=True, tag="STEP_STARTED"):
    """A phase of a boot or of its end begins."""

    step_name: str


class StepFinished(_AguiEvent, frozen=True, tag="STEP_FINISHED"):
    """The phase is over."""

    step_name: str


class TextMessageStart(_AguiEvent, frozen=True, tag="TEXT_MESSAGE_START"):
    """Opens a message."""

    message_id: str
    role: Literal["assistant"] = "assistant"


class TextMessageContent(_AguiEvent, frozen=True, tag="TEXT_MESSAGE_CONTENT"):
    """The text of a message about an event, for people."""

    message_id: str
    delta: str


class TextMessageEnd(_AguiEvent, frozen=True, tag="TEXT_MESSAGE_END"):
    """Closes a message."""

    message_id: str


AguiEvent = (
    RunStarted
    | RunFinished
    | RunError
    | StateSnapshot
    | StateDelta
    | Custom
    | StepStarted
    | StepFinished
    | TextMessageStart
    | TextMessageContent
    | TextMessageEnd
)


class State:
    """The state on the client, `{"vms": {name: VM}}`, and its changes."""

    def __init__(self) -> None:
        self._vms: dict[str, dict[str, Any]] = {}

    def snapshot(self, vms: Iterable[VmView]) -> StateSnapshot:
        """Replaces the state, and returns it."""
        self._vms = {vm.name: msgspec.to_builtins(vm) for vm in vms}
        return StateSnapshot({"vms": dict(self._vms)})

    def after(self, event: Event, vm: VmView | None) -> list[StateDelta]:
        """Returns the changes by an event; `vm` is its VM at present, and may be newer than the event."""
        before = self._vms.get(event.name)
        if before is not None and before["id"] != (event.vm_id if vm is None else vm.id):
            before = None
        if event.type is EventType.VM_DELETED and vm is None:
            if before is None:
                return []
            del self._vms[event.name]
            return [StateDelta((PatchOperation("remove", f"/vms/{event.name}"),))]
        if vm is not None:
            now = msgspec.to_builtins(vm)
        elif before is not None:
            now = dict(before)
        else:
            return []  # The VM was created and deleted, and does not exist any more.
        # In a fleet, one that has moved to another host has another id there: the event is about its former self.
        if vm is None or (vm.id == event.vm_id and vm.status is not event.status):
            now["status"] = event.status
            now["reason"] = msgspec.to_builtins(event.reason)
        self._vms[event.name] = now
        path = f"/vms/{event.name}"
        if before is None:
            return [StateDelta((PatchOperation("add", path, now),))]
        changes = tuple(
            PatchOperation("replace", f"{path}/{key}", value) for key, value in now.items() if before[key] != value
        )
        return [StateDelta(changes)] if changes else []


class Overview:
    """All VMs in one run, which lasts as long as the connection."""

    def __init__(self, thread_id: str, run_id: str) -> None:
        self._thread_id = thread_id
        self._run_id = run_id
        self._state = State()

    def begin(self, vms: Iterable[VmView], *, resumed: bool) -> list[AguiEvent]:
        """Returns the first events of a connection."""
        started: list[AguiEvent] = [] if resumed else [RunStarted(self._thread_id, self._run_id)]
        return [*started, self._state.snapshot(vms)]

    def events_for(self, event: Event, vm: VmView | None) -> list[AguiEvent]:
        """Returns the AG-UI events for an event of a VM."""
        return [*self._state.after(event, vm), Custom(f"volant.vm.{event.type}", event)]

    def catch_up(self, vms: Iterable[VmView]) -> list[AguiEvent]:
        """Returns the state, for a reader that is too far behind."""
        return [self._state.snapshot(vms)]

    def end(self) -> list[AguiEvent]:
        """Returns the last events, at a clean close."""
        return [RunFinished(self._thread_id, self._run_id)]


class Boots:
    """One VM: each boot is a run, its phases are steps, and each event is a message."""

    def __init__(self, thread_id: str, run_id: str, new_run_id: Callable[[], str], *, once: bool = False) -> None:
        """Creates it. `run_id` is the id of the first run. With `once` there is no other run."""
        self._thread_id = thread_id
        self._next_run_id = run_id
        self._new_run_id = new_run_id
        self._once = once
        self._state = State()
        self._status: Status | None = None
        self.over = False
        """Whether the only run has ended, so that no more events follow."""
        self.run_id = ""
        """The id of the current run; empty between runs."""
        self.boot = 0
        """The generation of the boot of the current run."""
        self.step: str | None = None
        """The open step."""

    def resume(self, boot: int, step: str | None) -> None:
        """Continues a run that the client has open from an earlier connection; with `boot` 0 its boot is unknown."""
        self.run_id, self.boot, self.step = self._next_run_id, boot, step

    def catch_up(self, row: VmRow | None) -> list[AguiEvent]:
        """Returns the events from the client's state to the present one, at the beginning and for a reader that is too
        far behind."""
        events: list[AguiEvent] = []
        if self.over:
            return events
        self._status = row.status if row is not None else None
        up = row is not None and row.status in _UP
        if self.run_id:
            events.append(self._state.snapshot([row.view] if row is not None else []))
            if row is None or not up or self.boot not in (0, row.booted):
                reason = row.reason if row is not None and row.status is Status.CRASHED else None
                events += self._end(reason.code, reason.message) if reason else self._end()
        if row is not None and up and not self.over:
            if not self.run_id:
                events += self._begin(row)
            self.boot = row.booted
            events += self.phase(row)
        return events

    def events_for(self, event: Event, row: VmRow | None) -> list[AguiEvent]:
        """Returns the AG-UI events for an event of this VM; `row` is its present row."""
        self._status = event.status
        events: list[AguiEvent] = []
        if self.over:
            return events
        if event.type is EventType.VM_STARTING:
            if self.run_id:
                events += self._end()
            if row is not None and not self.over:
                events += self._begin(row)
        elif event.type is EventType.VM_CRASHED and not self.run_id and row is not None:
            events += self._begin(row)
        if not self.run_id:
            return events
        events += self._state.after(event, None if row is None else row.view)
        events += [
            TextMessageStart(event.id),
            TextMessageContent(event.id, event.message or str(event.type)),
            TextMessageEnd(event.id),
        ]
        if event.type is EventType.VM_CRASHED:
            reason = event.reason
            events += self._end(reason.code, reason.message) if reason else self._end("crashed", event.message)
        elif event.type in (EventType.VM_STOPPED, EventType.VM_DELETED):
            events += self._end()
        elif row is not None:
            events += self.phase(row)
        return events

    def phase(self, row: VmRow) -> list[AguiEvent]:
        """Returns the events for the phase in `row`, if it changed; to be sent after the events that led to it."""
        if not self.run_id or row.status is not self._status:
            return []
        return self._step(None if row.phase is Phase.NONE else str(row.phase))

    def end(self) -> list[AguiEvent]:
        """Returns the last events of a connection; the boot may continue, or not have begun."""
        if self.over:
            return []
        begun: list[AguiEvent] = [] if self.run_id else [RunStarted(self._thread_id, self._next_run_id)]
        self.run_id = self.run_id or self._next_run_id
        return begun + self._end()

    def _begin(self, row: VmRow) -> list[AguiEvent]:
        self.run_id, self._next_run_id = self._next_run_id or self._new_run_id(), ""
        self.boot = row.booted
        return [RunStarted(self._thread_id, self.run_id), self._state.snapshot([row.view])]

    def _end(self, code: str | None = None, message: str = "") -> list[AguiEvent]:
        events = self._step(None)
        events.append(RunFinished(self._thread_id, self.run_id) if code is None else RunError(message or code, code))
        self.over = self._once
        self.run_id, self.boot, self._next_run_id = "", 0, ""
        return events

    def _step(self, step: str | None) -> list[AguiEvent]:
        events: list[AguiEvent] = []
        if step != self.step:
            if self.step is not None:
                events.append(StepFinished(self.step))
            if step is not None:
                events.append(StepStarted(step))
            self.step = step
        return events
