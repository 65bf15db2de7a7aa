"""Controls a QEMU process and detects how its guest ends.

QMP reports the end of the guest, the pidfd the end of the process. A guest that shuts down, panics or reboots leaves
QEMU paused, and `query-status` still shows the reason later. So `attach` asks once and then listens to events.

A kernel that panics before it loads its pvpanic driver reboots, and QEMU only reports `shutdown`. Then the end of the
console shows the panic. The guest writes that text, so it may lie, but only about its own end.

A process that hangs sends no event. So the daemon queries its status at long intervals, as a thousand idle machines
must not cost a CPU, and several times before it gives up, as the host may only be busy.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from volant.concurrency import Backoff, open_helpers
from volant.host import Host, Process, ProcessGone, bound_log
from volant.hypervisor._interface import (
    NOT_STARTED,
    PAUSED,
    Checkpoint,
    CheckpointFailed,
    End,
    HoldChannel,
    HypervisorError,
    MachineSpec,
    ParkedControl,
)
from volant.model import EndKind, ProcessIdentity

from ._checkpoint import Checkpointer
from ._compatibility import STATE_LIMIT
from ._migration import Migration, await_disconnect, complete, finish_loading, machine_type, save_devices
from ._netdev import connects_itself, plug_in
from ._qmp import QmpClient, QmpLost, connect_control
from ._sandbox import make_state_file
from ._volume_disks import disk_error, resize_arguments, throttle_arguments

ATTACH_S = 10.0
PULSE_S = 600.0
"""Seconds between two status queries of a machine."""
PULSE_TOGETHER_S = 30.0
"""Queries that are due within this time run together, as waking up costs more than a query."""
PULSE_ANSWER_S = 20.0
PULSES_MISSED = 3
"""The number of consecutive unanswered queries after which QEMU counts as hung."""

_UNDO_S = 30.0
_UNDO_RETRY_S, _UNDO_MAX_RETRY_S = 2.0, 30.0
_CLOSING_S = 1.0
_DISK_ERRORS_S = 60.0
_DISKS_S = 30.0
"""Maximum time for changes of disks. QEMU first completes the guest's running requests."""
_TAIL = 4096
_CONSOLE_TAIL = 64 * 1024
_PANIC = re.compile(rb"Kernel panic - not syncing: ([\x20-\x7e]{1,200})")

_BY_STATUS = {
    "shutdown": End(EndKind.SHUTDOWN, "the guest shut down, or rebooted while no daemon was attached"),
    "guest-panicked": End(EndKind.PANICKED, "the guest's kernel panicked"),
    "internal-error": End(EndKind.INTERNAL_ERROR, "the virtual CPU stopped with an internal error"),
}
_GUEST_SHUTDOWN = End(EndKind.SHUTDOWN, "the guest shut down")
_BY_REASON = {
    "guest-shutdown": _GUEST_SHUTDOWN,
    "guest-reset": End(EndKind.RESET, "the guest rebooted"),
    "guest-panic": End(EndKind.PANICKED, "the guest's kernel panicked"),
}


class ParkedQmp(ParkedControl):
    """A session without a reader. QEMU's events are kept for the next attachment."""

    def __init__(self, stream: trio.SocketStream, qmp: QmpClient) -> None:
        self.stream = stream
        self.qmp = qmp
        self.paused = True
        """Whether the guest is known to be paused."""
        self.missed: list[tuple[str, dict[str, Any]]] = []
        qmp.set_handler(self._on_event)

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self.stream)

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        # It is read for a moment in each claim alone.
        self.missed.append((name, data))


class QemuMachine(msgspec.Struct, eq=False):
    """A QEMU machine, see `volant.hypervisor.Machine`."""

    _host: Host
    _spec: MachineSpec
    identity: ProcessIdentity
    _process: Process | None
    _closing: AsyncExitStack
    _stream: trio.SocketStream | None = None
    _qmp: QmpClient | None = None
    _guest_end: End | None = None
    _guest_ended: trio.Event = msgspec.field(default_factory=trio.Event)
    _stopped: trio.Event = msgspec.field(default_factory=trio.Event)
    _moving: trio.Lock = msgspec.field(default_factory=trio.Lock)
    """Held while the guest is paused or resumed."""
    _left_paused: trio.Event = msgspec.field(default_factory=trio.Event)
    """Set when a checkpoint could not resume the guest."""
    _migration: Migration | None = None
    _report_disk: Callable[[str], None] | None = None
    _disk_reported_at: float = -math.inf

    async def ended(self) -> End:
        if self._process is None:
            await trio.lowlevel.checkpoint()
            return End(EndKind.GONE, "the hypervisor's process ended while no daemon was attached")
        process_end: list[End] = []
        hangs = False

        async def watch_process(scope: trio.CancelScope) -> None:
            process_end.append(await self._process_end())
            scope.cancel()

        async def watch_guest(scope: trio.CancelScope) -> None:
            await self._guest_ended.wait()
            scope.cancel()

        async def watch_control(scope: trio.CancelScope) -> None:
            if self._qmp is not None:
                await self._qmp.lost.wait()
                # A process that ends closes its sockets before its pidfd becomes readable.
                await trio.sleep(_CLOSING_S)
                scope.cancel()

        async def watch_pulse(scope: trio.CancelScope) -> None:
            nonlocal hangs
            if self._qmp is not None:
                await self._until_it_hangs()
                hangs = True
                scope.cancel()

        async with trio.open_nursery() as nursery:
            for watch in (watch_process, watch_guest, watch_control, watch_pulse):
                nursery.start_soon(watch, nursery.cancel_scope)
        if self._guest_end is not None:
            return await self._with_panic(self._guest_end)
        if process_end:
            return process_end[0]
        if hangs:
            raise HypervisorError(
                f"QEMU hangs: process {self.identity.pid} did not answer {PULSES_MISSED} queries, each within "
                f"{PULSE_ANSWER_S:g} s"
            )
        raise HypervisorError(f"QEMU runs but can't be controlled: {self._qmp.why if self._qmp else ''}")

    async def _until_it_hangs(self) -> None:
        """Queries the status at intervals. Returns when QEMU does not answer any more."""
        # Spreads the queries of machines that were adopted at the same time.
        await _sleep_about(PULSE_S * (self._spec.vm_id * 37 % 100) / 100)
        missed = 0
        while missed < PULSES_MISSED:
            try:
                await self._execute("query-status", PULSE_ANSWER_S)
                missed = 0
            except QmpLost:
                missed += 1
            if not missed:
                await _sleep_about(PULSE_S)

    async def status(self) -> str:
        answer = await self._execute("query-status")
        return str(answer.get("status")) if isinstance(answer, dict) else "unknown"

    async def pause(self, timeout_s: float = 30.0) -> None:
        async with self._alone(timeout_s):
            self._cancel_undo()
            await self._execute("stop", timeout_s)
            status = await self.status()
            if status not in PAUSED:
                raise HypervisorError(f"the guest can't be paused: QEMU says that it is {status!r}")

    async def resume(self, timeout_s: float = 30.0) -> None:
        async with self._alone(timeout_s):
            await self._resume(timeout_s)

    async def _resume(self, timeout_s: float) -> None:
        status = await self.status()
        if status == "inmigrate" and self._spec.template is not None and self._qmp is not None:
            await finish_loading(self._host, self._spec, self._qmp)
            status = await self.status()
        # `cont` makes QEMU report a false stop of a running machine, and has no effect before the state is loaded.
        if status in PAUSED or status in NOT_STARTED - {"inmigrate"}:
            await self._execute("cont", timeout_s)
        elif status == "inmigrate":
            raise HypervisorError("QEMU waits for the state of another machine, and has not loaded one")
        self._cancel_undo()

    def _cancel_undo(self) -> None:
        """Disables `undo_checkpoints`, as something else decides whether the guest runs."""
        if self._left_paused.is_set():
            self._left_paused = trio.Event()

    @asynccontextmanager
    async def _alone(self, timeout_s: float) -> AsyncIterator[None]:
        """Excludes other calls that pause or resume the guest, for the block."""
        with trio.move_on_after(timeout_s) as waiting:
            await self._moving.acquire()
        if waiting.cancelled_caught:
            raise HypervisorError(f"the guest is paused while it is copied, and was not resumed within {timeout_s:g} s")
        try:
            yield
        finally:
            self._moving.release()

    async def connect_network(self) -> bool:
        if self._qmp is None:
            raise HypervisorError("the hypervisor's process is gone")
        try:
            if connects_itself(self._host.proc.command_line(self.identity)):
                return False
            await plug_in(self._host, self._qmp, self._spec.nic)
        except (OSError, trio.TooSlowError, ProcessGone) as error:
            raise HypervisorError(f"the VM's network can't be connected: {str(error) or 'no answer'}") from error
        return True

    def watch_disks(self, report: Callable[[str], None]) -> None:
        self._report_disk = report

    async def grow_volume(self, serial: str, size_bytes: int) -> None:
        try:
            arguments = resize_arguments(self._spec, serial, size_bytes)
        except LookupError:
            raise HypervisorError(f"the machine has no volume {serial}") from None
        await self._execute("block_resize", _DISKS_S, **arguments)

    async def limit_disks(self) -> None:
        if self._spec.disk_limits is not None:
            for arguments in throttle_arguments(self._spec, self._spec.disk_limits):
                await self._execute("block_set_io_throttle", _DISKS_S, **arguments)

    async def save(self, state: Path, timeout_s: float = 30.0) -> None:
        if self._qmp is None:
            raise HypervisorError("the hypervisor's process is gone")
        host, root = self._host, self._spec.root
        try:
            saved = await make_state_file(host, self._spec, self.identity)
            if root is None or root.image is None:
                self._migration = Migration()
                await self._migration.save(self._qmp, saved, timeout_s)
                await host.files.copy(saved, state)
            else:
                await await_disconnect(self._qmp)
                await self._qmp.execute("stop")
                await save_devices(self._qmp, saved, timeout_s)
                devices = await host.files.read(saved, STATE_LIMIT)
                await host.files.write(state, complete(devices, await machine_type(self._qmp)))
            await host.files.remove(saved)
        except ProcessGone as error:
            raise HypervisorError(f"the machine could not be saved: {error}") from error
        except OSError as error:
            raise HypervisorError(f"the machine's state can't be written: {error}") from error

    async def checkpoint(
        self, into: Path, *, hold: HoldChannel, timeout_s: float = 60.0, volumes: Path | None = None
    ) -> Checkpoint:
        if self._qmp is None:
            raise CheckpointFailed("refused", "the hypervisor's process is gone")
        checkpoint = Checkpointer(self._host, self._spec, self.identity, self._qmp)
        with trio.move_on_after(timeout_s) as waiting:
            await self._moving.acquire()
        if waiting.cancelled_caught:
            raise CheckpointFailed("too_slow", f"another operation kept the guest paused for {timeout_s:g} s")
        try:
            return await checkpoint.take(into, hold, timeout_s, volumes)
        finally:
            if checkpoint.stuck:
                self._left_paused.set()
            self._moving.release()

    def park(self) -> ParkedControl | None:
        if self._qmp is None or self._stream is None or self._guest_end is not None or not self._qmp.park():
            return None
        return ParkedQmp(self._stream, self._qmp)

    async def quit(self, timeout_s: float = 5.0) -> End:
        if self._process is not None:
            with trio.move_on_after(timeout_s):
                try:
                    await self._execute("quit", timeout_s)
                except HypervisorError:
                    pass  # it may have ended before it answered
                return await self._process_end()
        return await self.kill()

    async def kill(self, timeout_s: float = 10.0) -> End:
        if self._process is None:
            return await self.ended()
        self._process.kill()
        with trio.move_on_after(timeout_s):
            end = await self._process_end()
            if end.exit_status is None:
                return End(EndKind.KILLED, "the hypervisor's process was killed")
            return end
        raise HypervisorError(f"QEMU (process {self.identity.pid}) still exists {timeout_s:g} s after SIGKILL")

    # For `attach`

    async def take(self, control: ParkedQmp, nursery: trio.Nursery) -> None:
        """Continues with a session. If the machine has ended, the session turns out to be lost."""
        self._stream, self._qmp = control.stream, control.qmp
        self._closing.push_async_callback(self._close)
        for name, data in control.missed:
            self._on_event(name, data)
        self._qmp.set_handler(self._on_event)
        await nursery.start(self._qmp.start)

    async def _close(self) -> None:
        """Closes the connection, as QEMU serves one client at a time."""
        if self._stream is not None and self._qmp is not None and not self._qmp.is_parked:
            await trio.aclose_forcefully(self._stream)

    async def connect(self, nursery: trio.Nursery) -> None:
        """Connects to the control socket. Raises HypervisorError, unless the process has ended."""
        assert self._process is not None
        try:
            with trio.fail_after(ATTACH_S):
                stream = self._stream = await self._reach(self._process)
                self._qmp = QmpClient(stream, self._on_event, self._host.random)
                self._closing.push_async_callback(self._close)
                await nursery.start(self._qmp.start)
                await self._verify()
        except (OSError, QmpLost, trio.TooSlowError) as error:
            # A process that ends closes its sockets before its pidfd becomes readable.
            with trio.move_on_after(_CLOSING_S):
                await self._process.wait()
                return
            raise HypervisorError(f"QEMU runs but does not answer: {str(error) or 'no greeting'}") from error

    async def _reach(self, process: Process) -> trio.SocketStream:
        """Connects to the control socket while the process lives. The socket may not exist yet if the daemon was killed
        right after the launch. Raises OSError."""
        stream, failure = None, None

        async def watch_process(scope: trio.CancelScope) -> None:
            await process.wait()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_process, nursery.cancel_scope)
            try:
                stream = await connect_control(self._host, self._spec.control_path, ATTACH_S)
            except OSError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if stream is None:
            raise failure or ConnectionRefusedError(f"the process ended before {self._spec.control_path} was listening")
        return stream

    async def explain_stops(self) -> None:
        """Queries the reason whenever the machine stops."""
        while True:
            await self._stopped.wait()
            self._stopped = trio.Event()
            try:
                self._take_status(await self.status())
            except HypervisorError:
                return  # `ended` reports it

    async def undo_checkpoints(self) -> None:
        """Resumes the guest that a checkpoint left paused, unless `pause` was called in between."""
        backoff = Backoff(_UNDO_RETRY_S, _UNDO_MAX_RETRY_S)
        while True:
            await self._left_paused.wait()
            try:
                async with self._alone(_UNDO_S):
                    if self._left_paused.is_set():
                        await self._resume(_UNDO_S)
                backoff.reset()
            except HypervisorError:
                await backoff.pause()

    async def _verify(self) -> None:
        assert self._qmp is not None
        name = await self._qmp.execute("query-name")
        if not isinstance(name, dict) or name.get("name") != self._spec.tag:
            raise HypervisorError(f"{self._spec.control_path} belongs to another machine")
        self._take_status(await self.status())

    def _take_status(self, status: str) -> None:
        end = _BY_STATUS.get(status)
        if end is not None:
            self._set_end(end)

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "SHUTDOWN":
            end = _BY_REASON.get(str(data.get("reason")))
            if end is not None:
                self._set_end(end)
        elif name == "GUEST_PANICKED":
            self._set_end(_BY_STATUS["guest-panicked"])
        elif name == "STOP":
            # The event does not say why, and an internal error of the virtual CPU has no event of its own.
            self._stopped.set()
        elif name == "BLOCK_IO_ERROR":
            self._note_disk_error(data)
        elif self._migration is not None:
            self._migration.on_event(name, data)

    def _note_disk_error(self, event: dict[str, Any]) -> None:
        due = trio.current_time() - self._disk_reported_at >= _DISK_ERRORS_S
        if due and self._report_disk is not None:
            self._disk_reported_at = trio.current_time()
            self._report_disk(disk_error(self._spec, event))

    def _set_end(self, end: End) -> None:
        if self._guest_end is None:
            self._guest_end = end
            self._guest_ended.set()

    async def _with_panic(self, end: End) -> End:
        """Returns the end as a panic if the console shows one."""
        if end is _GUEST_SHUTDOWN:
            return end
        try:
            tail = await self._host.files.read_tail(self._spec.console_path, _CONSOLE_TAIL)
        except OSError:
            return end
        found = _PANIC.findall(tail)
        if not found:
            return end
        text = found[-1].decode("utf-8", "replace").strip()
        return End(EndKind.PANICKED, f"the guest's kernel panicked: {text}")

    async def _execute(self, command: str, timeout_s: float = 5.0, **arguments: object) -> Any:
        if self._qmp is None:
            raise HypervisorError("the hypervisor's process is gone")
        return await self._qmp.execute(command, arguments, timeout_s=timeout_s)

    async def _process_end(self) -> End:
        assert self._process is not None
        status = await self._process.wait()
        last = await log_tail(self._host, self._spec.log_path)
        said = f"; its last output: {last}" if last else ""
        if status is not None and status < 0:
            return End(EndKind.KILLED, f"the hypervisor's process was killed by signal {-status}{said}", status)
        if status is not None:
            return End(EndKind.EXITED, f"the hypervisor's process exited with status {status}{said}", status)
        return End(
            EndKind.EXITED,
            f"the hypervisor's process ended; its exit status is unknown, as an earlier daemon started it{said}",
        )


@asynccontextmanager
async def attach(
    host: Host, spec: MachineSpec, identity: ProcessIdentity, control: ParkedQmp | None = None
) -> AsyncIterator[QemuMachine]:
    """Implements `volant.hypervisor.Hypervisor.attach`."""
    async with AsyncExitStack() as closing:
        try:
            process = closing.enter_context(host.processes.open(identity))
        except (OSError, ProcessGone) as error:
            if control is not None:
                await control.aclose()
            if not isinstance(error, ProcessGone):
                raise
            yield QemuMachine(host, spec, identity, None, closing)
            return
        machine = QemuMachine(host, spec, identity, process, closing)
        async with open_helpers() as helpers:
            helpers.start_soon(bound_log, host, spec.log_path)
            await (machine.connect(helpers) if control is None else machine.take(control, helpers))
            helpers.start_soon(machine.explain_stops)
            helpers.start_soon(machine.undo_checkpoints)
            yield machine


async def _sleep_about(seconds: float) -> None:
    """Sleeps that long, or up to `PULSE_TOGETHER_S` longer to wake up together with others."""
    due = trio.current_time() + seconds
    await trio.sleep_until(math.ceil(due / PULSE_TOGETHER_S) * PULSE_TOGETHER_S)


async def log_tail(host: Host, path: Path) -> str:
    """Returns the last lines of QEMU's own output, in one line."""
    try:
        tail = await host.files.read_tail(path, _TAIL)
    except OSError:
        return ""
    lines = [line.strip() for line in tail.decode("utf-8", "replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-1000:]
