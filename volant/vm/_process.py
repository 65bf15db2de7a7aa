"""Watches one hypervisor's process, from its launch until nothing of it is left.

The tasks of the watch begin when the row has a process, whatever the VM's status does meanwhile:

- attach to the hypervisor, and report how the guest ends;
- apply the resource limits, and notice when the kernel kills the process for lack of memory;
- carry the console into the log, and serve it at its socket;
- the session with the agent (`_agent_session.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import trio

from volant.channel import AgentProtocolError, AgentUnreachable
from volant.concurrency import Backoff
from volant.host import Host, ProcessGone, ResourceLimits
from volant.hypervisor import (
    NOT_STARTED,
    PAUSED,
    Checkpoint,
    CheckpointFailed,
    Hypervisor,
    HypervisorError,
    Machine,
    MachineSpec,
    ParkedControl,
)
from volant.logs import LogEntry, VmLog
from volant.model import GUEST_SHUTDOWN, Ended, EndKind, ProcessIdentity, Reason, Seen
from volant.session import AgentSession, ConsolePump, SerialConsole, console_source

from ._capacity import CEILING_MB
from ._fence import VmFence

# Counts how often a VM's process wakes up, which is what an idle VM costs.
#
# Each timer of the guest and each byte of its devices wakes threads of QEMU, for some 40 microseconds of a CPU each. So
# the rate shows whether a guest is idle, and which workload keeps it awake.


_AT_LEAST_S = 1.0
"""Rates over less time are noise."""


class Wakeups:
    """The wake-ups of one process, over all its threads."""

    def __init__(self, host: Host, identity: ProcessIdentity) -> None:
        self._host = host
        self._identity = identity
        self._before: tuple[float, int] | None = None

    def inspect(self) -> dict[str, object] | None:
        """Returns the total, and the rate since the last inspection if there was one; None if the process has ended."""
        try:
            total = self._host.proc.wakeups(self._identity)
        except ProcessGone:
            return None
        now = self._host.clock.monotonic()
        if self._before is None:
            self._before = now, total
        then, before = self._before
        if now - then < _AT_LEAST_S:
            return {"total": total, "per_s": None, "over_s": None}
        self._before = now, total
        return {
            "total": total,
            "per_s": round(max(0, total - before) / (now - then), 1),
            "over_s": round(now - then, 1),
        }


_PANIC = "Kernel panic - not syncing"
_OUT_OF_MEMORY = (
    "the kernel killed the hypervisor's process, because the host or the VM's share of it is short of memory"
)

_CODES = {
    EndKind.SHUTDOWN: GUEST_SHUTDOWN,
    EndKind.RESET: "guest_reset",
    EndKind.PANICKED: "guest_panicked",
    EndKind.KILLED: "hypervisor_killed",
    EndKind.EXITED: "hypervisor_exited",
    EndKind.INTERNAL_ERROR: "hypervisor_error",
    EndKind.GONE: "hypervisor_gone",
}
"""The codes of reasons in events and rows, which clients see."""


def reason_of_end(
    kind: EndKind, message: str, console: tuple[str, ...], *, short_of_memory: bool = False
) -> tuple[EndKind, Reason]:
    """Returns the real end of the guest, and its reason.

    A kernel that panics before it has the device for reports reboots, because of its command line. Then only the last
    lines of the console distinguish a panic from a reboot.

    :param short_of_memory: the kernel killed a process of the VM
    """
    if kind in (EndKind.PANICKED, EndKind.RESET):
        for line in reversed(console):
            _, panic, why = line.partition(_PANIC)
            if panic:
                kind = EndKind.PANICKED
                return kind, Reason(_CODES[kind], f"the guest's kernel panicked{why}", console)
    if short_of_memory and kind in (EndKind.KILLED, EndKind.EXITED):
        return EndKind.KILLED, Reason("out_of_memory", f"{_OUT_OF_MEMORY}: {message}", console)
    return kind, Reason(_CODES[kind], message, console)


_RETRY_S, _RETRY_MAX_S = 0.1, 10.0
_ATTACHED_S = 15.0
_CLOSING_S = 2.0
"""The wait for the end of a process after its connections have closed."""
_CONSOLE_LINES = 60
"""The console lines in a reason. A panic has some forty lines, including its trace."""
_CONSOLE_CHARACTERS = 500
_MAX_SANDBOX_BYTES = 65536
_MAX_WEIGHT = 10_000
_logger = logging.getLogger("volant.vm")
_TASKS = 256
"""Threads of a QEMU besides those of its vCPUs. It has some ten, and up to 64 more with a slow disk."""


class VmProcess:
    """The hypervisor's process of one VM under watch."""

    def __init__(
        self,
        host: Host,
        hypervisor: Hypervisor,
        spec: MachineSpec,
        identity: ProcessIdentity,
        log: VmLog,
        boot_key: str,
        report: Callable[[Seen], Awaitable[None]],
        agent: AgentSession,
        *,
        paused: bool,
        take_control: Callable[[], ParkedControl | None],
        fence: VmFence | None,
    ) -> None:
        """Creates the watch.

        :param paused: whether the guest should be paused; a guest in the other state is corrected
        :param take_control: returns an existing connection to the hypervisor
        :param fence: while it is closed, the process is frozen; None without a fence
        """
        self.identity = identity
        self.agent = agent
        self.console = SerialConsole(host, spec.console_input_path, spec.console_socket_path)
        self.paused = paused
        """Whether the guest is paused, or may be."""
        self._host = host
        self._hypervisor = hypervisor
        self._spec = spec
        self._log = log
        self._boot_key = boot_key
        self._report = report
        self._take_parked = take_control
        self._fence = fence
        self._console: ConsolePump | None = None
        self._machine: Machine | None = None
        self._attached = trio.Event()
        self._memory_events: Path | None = None
        self._short_of_memory = False
        self._wakeups = Wakeups(host, identity)
        self._sandbox: dict[str, object] = {}
        """The sandbox of the process, from its launch."""

    def inspect(self) -> dict[str, object]:
        """Returns figures, ready for JSON."""
        return {
            "identity": msgspec.to_builtins(self.identity),
            **self.agent.inspect(),
            "console": self.console.inspect(),
            "wakeups": self._wakeups.inspect(),
            "sandbox": self._inspect_sandbox(),
        }

    def _inspect_sandbox(self) -> dict[str, object] | None:
        try:
            status = self._host.proc.status(self.identity)
        except ProcessGone:
            return None
        return {**self._sandbox, **msgspec.to_builtins(status), "limits": self._host.limits.of(self.identity)}

    async def run(self, beside: Sequence[Callable[[], Awaitable[None]]] = ()) -> None:
        """Watches the process until cancelled. `beside` are tasks that run as long."""
        pump = ConsolePump(self._host, self._spec.console_path, self._log, self._boot_key, feed=self.console.feed)
        with ExitStack() as stack:
            try:
                console = stack.enter_context(pump)
            except FileNotFoundError:
                # The host was rebooted: files in RAM are gone, and the guest with them.
                await self._watch()
                return
            stack.enter_context(self.console.fed_by(console))
            self._console = console
            # From then on the log has the last lines.
            stack.callback(setattr, self, "_console", None)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._limit)
                nursery.start_soon(console.follow)
                nursery.start_soon(self.console.serve)
                nursery.start_soon(self.agent.run)
                nursery.start_soon(self._watch)
                for task in beside:
                    nursery.start_soon(task)

    async def machine(self) -> Machine:
        """Returns the machine. :raises HypervisorError: the daemon is not attached to it, or it has ended."""
        with trio.move_on_after(_ATTACHED_S):
            await self._attached.wait()
        if self._machine is None:
            raise HypervisorError("the hypervisor is not under control at present")
        return self._machine

    async def pause(self) -> None:
        """Pauses the guest. Requests to its agent wait. :raises HypervisorError:"""
        machine = await self.machine()
        self._set_paused(True)
        await machine.pause()

    async def resume(self) -> None:
        """Resumes the guest. :raises HypervisorError:"""
        machine = await self.machine()
        await machine.resume()
        self._set_paused(False)

    async def checkpoint(self, into: Path, volumes: Path | None, timeout_s: float) -> Checkpoint:
        """Copies the guest into an empty directory, and its volumes into another one. Requests to its agent wait
        briefly. :raises HypervisorError: including CheckpointFailed."""
        machine = await self.machine()
        try:
            channel = await self.agent.connection.channel()
        except AgentUnreachable as error:
            raise CheckpointFailed("refused", str(error)) from None
        return await machine.checkpoint(into, hold=channel.hold, timeout_s=timeout_s, volumes=volumes)

    async def report_lost_directory(self, why: str) -> None:
        """Reports that the guest has lost a directory of the host. If the hypervisor ends too, there is no report, as
        the directory's process has ended with it."""
        with suppress(ProcessGone), self._host.processes.open(self.identity) as process:
            with trio.move_on_after(_CLOSING_S):
                await process.wait()
            if not process.exited:
                reason = Reason("host_directory_lost", why, await self.console_tail())
                await self._report(Ended(EndKind.INTERNAL_ERROR, reason))

    async def console_tail(self) -> tuple[str, ...]:
        """Returns the last lines of this boot's console, up to now."""
        if self._console is not None:
            with trio.move_on_after(1.0):
                await self._console.drain()
        lines = self._log.tail_lines(_CONSOLE_LINES, source=console_source(self._boot_key))
        return tuple(line[:_CONSOLE_CHARACTERS] for line in lines)

    def _set_paused(self, paused: bool) -> None:
        self.paused = paused
        self.agent.connection.set_paused(paused)

    async def _limit(self) -> None:
        """Reads the sandbox, applies the resource limits, and notices when the kernel kills for lack of memory."""
        if self._host.files.exists(self._spec.sandbox_path):
            with suppress(OSError, ValueError):
                data = await self._host.files.read(self._spec.sandbox_path, _MAX_SANDBOX_BYTES)
                self._sandbox = msgspec.json.decode(data, type=dict[str, object])
        await self._host.limits.apply(self.identity, f"VM {self._spec.name}", bounds_of(self._spec))
        self._memory_events = events = self._host.limits.oom_events(self.identity)
        if events is None:
            return
        with suppress(OSError), self._host.watches.open(events) as watch:
            while not self._was_short_of_memory():
                await watch.wait()

    def _was_short_of_memory(self) -> bool:
        if self._memory_events is not None and not self._short_of_memory:
            with suppress(OSError):
                self._short_of_memory = self._host.limits.oom_kills(self._memory_events) > 0
        return self._short_of_memory

    async def _watch(self) -> None:
        """Attaches to the hypervisor, and reports the end of the guest. A frozen hypervisor is sent no request."""
        while (end := await self._attend()) is None:
            self._attached = trio.Event()
        kind, message = end
        console = await self.console_tail()
        kind, reason = reason_of_end(kind, message, console, short_of_memory=self._was_short_of_memory())
        await self._report(Ended(kind, reason))

    async def _attend(self) -> tuple[EndKind, str] | None:
        """Returns the end of the guest; None if it is being frozen."""
        ended: list[tuple[EndKind, str]] = []
        if self._fence is not None:
            await self._fence.opened()
        async with trio.open_nursery() as nursery:
            if self._fence is not None:
                nursery.start_soon(_cancel_when_closed, self._fence, nursery.cancel_scope)
            ended.append(await self._attach())
            nursery.cancel_scope.cancel()
        return ended[0] if ended else None

    async def _attach(self) -> tuple[EndKind, str]:
        """Attaches to the hypervisor; returns the end of the guest."""
        try:
            attached = self._hypervisor.attach(self._spec, self.identity, self._take_parked())
            async with attached as machine, trio.open_nursery() as nursery:
                nursery.start_soon(self._take_control, machine)
                end = await _end_of(machine)
                nursery.cancel_scope.cancel()
                return end
        except HypervisorError as error:
            return EndKind.INTERNAL_ERROR, str(error)
        finally:
            self._machine = None

    async def _take_control(self, machine: Machine) -> None:
        """Pauses or resumes the guest if a killed daemon left it in the wrong state; then others may use it."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        was_left = False
        while True:
            try:
                status = await machine.status()
                if self.paused and status == "running":
                    await machine.pause()
                elif not self.paused and status in PAUSED | NOT_STARTED:
                    was_left = True
                    await machine.resume()
                break
            except HypervisorError:
                # `_watch` notices when it has ended.
                await backoff.pause()
        self._machine = machine
        self._attached.set()
        machine.watch_disks(self._note_disk_error)
        await self._limit_disks(machine)
        if was_left and self.agent.configured:
            with suppress(AgentUnreachable, AgentProtocolError):
                await self.agent.clock.set()

    def _note_disk_error(self, text: str) -> None:
        """Logs the reason of the guest's I/O errors, in both logs."""
        name = self._spec.name
        _logger.warning("VM %s: %s", name, text, extra={"vm": name})
        now = self._host.clock.now()
        entry = LogEntry(
            stream="stderr",
            line=f"volant: {text}".encode(errors="replace"),
            timestamp=now,
            source=f"{self._boot_key}/disks",
            position=int(now.timestamp()),
        )
        self._log.append([entry])

    async def _limit_disks(self, machine: Machine) -> None:
        """Applies the limits of the VM's disks. A failure leaves the VM under control."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        said = False
        while True:
            try:
                await machine.limit_disks()
                return
            except HypervisorError as error:
                if not said:
                    name = self._spec.name
                    _logger.warning("VM %s: its disks are not limited yet: %s", name, error, extra={"vm": name})
                said = True
            await backoff.pause()


async def _cancel_when_closed(fence: VmFence, scope: trio.CancelScope) -> None:
    await fence.closed()
    scope.cancel()


async def _end_of(machine: Machine) -> tuple[EndKind, str]:
    try:
        end = await machine.ended()
        return EndKind(end.kind), end.message
    except HypervisorError as error:
        return EndKind.INTERNAL_ERROR, str(error)


def bounds_of(spec: MachineSpec) -> ResourceLimits:
    """Returns the limits for the process of a machine's hypervisor."""
    return ResourceLimits(
        memory_mb=spec.memory_mb + CEILING_MB,
        cpus=spec.cpu_cores + 1,
        weight=min(_MAX_WEIGHT, 100 * spec.cpu_cores),
        tasks=_TASKS + spec.cpu_cores,
    )
