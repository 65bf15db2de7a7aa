"""What of one hypervisor process is alive in one incarnation of its actor: four tasks, and the move to its own scope.

They begin when the row has a process and end when nothing of it is left, whatever the VM's status does meanwhile:

- the watch on the hypervisor, which tells how the guest ended;
- the channel to the agent, opened again whenever it breaks while the process lives;
- the log pump, for the console and for what the workload writes;
- the socket that serves the serial console.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import msgspec
import trio

from volant.channel import (
    Address,
    AgentClient,
    AgentProtocolError,
    AgentUnreachable,
    Channel,
    VirtioSerial,
    Vsock,
    open_channel,
)
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
)
from volant.journal import VmLog
from volant.model import (
    GUEST_SHUTDOWN,
    Ended,
    EndKind,
    ProcessIdentity,
    Reason,
    Seen,
    WorkloadChanged,
    WorkloadView,
)
from volant.model.agent import (
    DAEMON_CLOCK,
    DAEMON_HOSTS,
    DAEMON_IDENTITY,
    DAEMON_MANIFEST,
    DAEMON_ROOT,
    DAEMON_WATCH,
    DAEMON_WORKLOAD,
    HEALTHZ,
    IDENTITY_AS_IT_IS_SINCE,
    IDENTITY_NETWORK_SINCE,
    IDENTITY_WORKLOAD_SINCE,
    INFO,
    PROTOCOL_MIN,
    PROTOCOL_VERSION,
)
from volant.model.agent_types import WorkloadState

from ._console import ConsolePump, console_source
from ._memory import CEILING_MB
from ._network import Neighbours
from ._output import pump_output
from ._serial import SerialConsole

_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 10.0
_ATTACHED_S = 15.0
_OPEN_S = 1.0
_ANSWER_S = 10.0
_ROOT_S = 20.0
"""The agent waits 15 s for the guest to be set up before it says that it is not."""
_ENTROPY_BYTES = 64
_BECOME_S = 15.0
"""The agent waits 6 s for a workload that was copied to be well."""
_CLONE_OUTPUT_S = 0.3
_HOSTS_PAUSE_S = 0.5
"""Of many who come to a network at once the others are told once."""
_HOSTS_AGAIN_MAX_S = 60.0
_CLOCK_OFF_NS = 25_000_000
_CLOCK_LEAD_NS = 20_000_000
"""A clock that is set ahead of a way that then takes no time is no further off than one may be."""
_CLOCK_TRIES = 5
"""On a busy host one in some ways is short enough."""
_CLOCK_FIRST_TRIES = 2
"""Of a copy, for which somebody waits. Where that was not enough, it is mended."""
_CLOCK_AGAIN_S, _CLOCK_AGAIN_MAX_S = 1.0, 60.0
_CLOCK_MENDS = 12
_LIMITED_S = 5.0
"""A guest that answers is done in a small part of it, on a busy host too."""
_CLOCK_S = 20.0
"""For the agent of a guest that has stood still to be there again, and to set its clock."""
_DETAIL_CHARACTERS = 1000
_WORKLOAD_PAUSE_S = 1.0
"""Each report is a commit, and a guest may change its mind as often as it likes."""
_MAX_STATUS = 64 * 1024
_CONSOLE_LINES = 60
"""With the trace that follows it, what a kernel says when it panics is some forty lines long."""
_CONSOLE_CHARACTERS = 500
_MAX_SANDBOX = 65536
_MAX_WEIGHT = 10_000
_TASKS = 256
"""Threads that a QEMU may have beside those of its vCPUs; it has some ten, and 64 more where a disk is slow."""
_OUT_OF_MEMORY = "out_of_memory"
_SHORT = "the kernel has killed the hypervisor's process, as the host or the VM's share of it is short of memory"
_PANIC = "Kernel panic - not syncing"


class RootFailed(Exception):
    """The guest has no root filesystem, although it should. The text is for people, in part the guest's."""


class _NotWell(AgentProtocolError):
    """The workload of a clone is ill."""


class _NoSuchRoute(AgentProtocolError):
    """The agent is older than what it is asked."""


class LiveProcess:
    """A hypervisor process under watch."""

    def __init__(
        self,
        host: Host,
        hypervisor: Hypervisor,
        spec: MachineSpec,
        identity: ProcessIdentity,
        log: VmLog,
        boot_key: str,
        report: Callable[[Seen], Awaitable[None]],
        *,
        manifest: Mapping[str, object] | None,
        workload: Mapping[str, object] | None,
        neighbours: Neighbours,
        telling: trio.CapacityLimiter,
        mending: trio.CapacityLimiter,
        signal: str | None = None,
        handed_over: bool,
        is_clone: bool = False,
        stands_still: bool = False,
    ) -> None:
        """`manifest`: what the agent is to know of its plugin, None: it is told nothing; `workload`: what it is to run;
        `neighbours`: what it is to know of its network, and `telling`: who may be told at a time that others are in it;
        `mending`: whose clock may be set again at a time;
        `signal`: what the workload is told by, when it was copied; `handed_over`: whether an earlier incarnation has
        told it; `is_clone`: whether the guest takes itself for another one until it has heard who it is;
        `stands_still`: whether it is paused. One that is found otherwise is made so."""
        self.identity = identity
        self._host = host
        self._hypervisor = hypervisor
        self._spec = spec
        self._log = log
        self._boot_key = boot_key
        self._report = report
        self.console = SerialConsole(host, spec.console_input_path, spec.console_socket_path)
        self._console: ConsolePump | None = None
        self._machine: Machine | None = None
        self._attached = trio.Event()
        self.stands_still = stands_still
        """Whether the guest is paused, or may be."""
        self._channel: Channel | None = None
        self._client: AgentClient | None = None
        self._output_error: str | None = None
        self._memory_events: Path | None = None
        self._short_of_memory = False
        self._sandbox: dict[str, object] = {}
        """What was kept of them when the process was started."""
        self._manifest = manifest
        self._workload = workload
        self._signal = signal
        self._neighbours = neighbours
        self._telling = telling
        self._mending = mending
        self._setting_hosts = trio.Lock()
        self._hosts: Mapping[str, str] | None = None
        """Those of which the guest was told; None: nobody can say."""
        self._handed_over = handed_over
        self._opened = trio.Event()
        self._heard: int | None = None
        """On which link its agent was told of its manifest and its workload."""
        self._is_itself = trio.Event()
        self._setting_clock = trio.Lock()
        self._clock_is_exact = True
        if handed_over or not is_clone:
            self._is_itself.set()
        self._protocol: int | None = None
        self.incompatible: str | None = None
        """Why the agent can't be talked to, although it answers."""

    @property
    def client(self) -> AgentClient | None:
        """The way to the agent, while its channel is open; whether the agent answers is another matter."""
        return self._client

    @property
    def reachable(self) -> bool:
        """Whether the agent is on the other end of the channel, as far as is known."""
        return self._channel is not None and self._channel.connected

    @property
    def protocol(self) -> int:
        """The newest that the agent is known to speak; 1, the oldest, before anything is."""
        return self._protocol or PROTOCOL_MIN

    def inspect(self) -> dict[str, object]:
        """Figures, ready for JSON."""
        return {
            "identity": msgspec.to_builtins(self.identity),
            "channel": None if self._channel is None else msgspec.to_builtins(self._channel.statistics()),
            "protocol": self._protocol,
            "incompatible": self.incompatible,
            "output_error": self._output_error,
            "console": self.console.inspect(),
            "sandbox": self._inspect_sandbox(),
        }

    def _inspect_sandbox(self) -> dict[str, object] | None:
        """What stands between the process and the host; None: it has ended."""
        try:
            status = self._host.proc.status(self.identity)
        except ProcessGone:
            return None
        return {**self._sandbox, **msgspec.to_builtins(status), "limits": self._host.limits.of(self.identity)}

    async def run(self, beside: Callable[[], Awaitable[None]] | None = None) -> None:
        """Keep the tasks until cancelled, and `beside` with them."""
        if self._host.files.exists(self._spec.sandbox_path):
            with suppress(OSError, msgspec.DecodeError):
                said = await self._host.files.read(self._spec.sandbox_path, _MAX_SANDBOX)
                self._sandbox = msgspec.json.decode(said, type=dict[str, object])
        pump = ConsolePump(self._host, self._spec.console_path, self._log, self._boot_key, tell=self.console.feed)
        with ExitStack() as stack:
            try:
                console = stack.enter_context(pump)
            except FileNotFoundError:
                # The host was rebooted: what lay in RAM is gone, and the guest with it.
                await self._watch()
                return
            stack.enter_context(self.console.fed_by(console))
            self._console = console
            # Whoever asks for its last lines afterwards gets them from the log.
            stack.callback(setattr, self, "_console", None)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._bound)
                nursery.start_soon(console.follow)
                nursery.start_soon(self.console.serve)
                nursery.start_soon(self._keep_channel)
                nursery.start_soon(self._mend_clock)
                if self._workload is not None:
                    nursery.start_soon(self._keep_workload)
                nursery.start_soon(self._watch)
                if self._neighbours.can_change:
                    nursery.start_soon(self._keep_hosts)
                if beside is not None:
                    nursery.start_soon(beside)

    async def _bound(self) -> None:
        """Hold the process to what its VM has a right to, and note when the kernel kills it as memory is short."""
        # Whoever finds the process later finds it there, or moves it then.
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

    async def machine(self) -> Machine:
        """The machine under watch, once it is that. Raises HypervisorError: it is not, or it has ended."""
        with trio.move_on_after(_ATTACHED_S):
            await self._attached.wait()
        if self._machine is None:
            raise HypervisorError("the hypervisor is not under control at present")
        return self._machine

    async def pause(self) -> None:
        """Let the guest stand still, and whoever talks to it wait. Raises HypervisorError."""
        machine = await self.machine()
        self._stand_still(True)
        await machine.pause()

    async def resume(self) -> None:
        """Let the guest go on. Raises HypervisorError."""
        machine = await self.machine()
        await machine.resume()
        self._stand_still(False)

    def _stand_still(self, yes: bool) -> None:
        self.stands_still = yes
        if self._channel is not None:
            self._channel.set_paused(yes)

    async def checkpoint(self, into: Path, timeout_s: float) -> Checkpoint:
        """Copy the guest into an empty directory; who talks to it waits for a moment. Raises HypervisorError."""
        machine = await self.machine()
        with trio.move_on_after(_OPEN_S):
            await self._opened.wait()
        if self._channel is None:
            raise CheckpointFailed("refused", "the channel to the guest is not open")
        return await machine.checkpoint(into, hold=self._channel.hold, timeout_s=timeout_s)

    async def set_clock(self) -> None:
        """Tell a guest that has stood still what time it is. An agent that is too old for it is left alone.

        :raises AgentUnreachable: it can't be reached in time. :raises AgentProtocolError: it refuses, and says why.
        """
        await self._once_reachable(self._set_clock)

    async def step_clock(self, behind_s: float) -> None:
        """Let the clock of a guest that has stood still for so long catch up, by a single request. Raises as
        `set_clock`."""

        async def step() -> None:
            async with self._setting_clock:
                await self._tell(DAEMON_CLOCK, {"step_ns": int(behind_s * 1e9)})

        await self._once_reachable(step)

    async def _once_reachable(self, tell: Callable[[], Awaitable[None]]) -> None:
        """Tell the guest's clock something, once there is somebody to hear it."""
        with trio.move_on_after(_CLOCK_S):
            await self._opened.wait()
            if self._channel is None:
                raise AgentUnreachable("the channel to the guest is not open")
            await self._channel.ready()
            with suppress(_NoSuchRoute):
                await tell()
            return
        raise AgentUnreachable(f"the agent did not take the time within {_CLOCK_S:g} s")

    async def ask(self, method: str, path: str, body: object = None, *, also: Collection[int] = ()) -> None:
        """One request of ours to the agent; of other answers than successes those with a status of `also` will do.

        :raises AgentUnreachable: it can't be reached.
        :raises AgentProtocolError: it refuses, or answers with nonsense.
        """
        with trio.move_on_after(_OPEN_S):
            await self._opened.wait()
        if self._client is None:
            raise AgentUnreachable("the channel to the guest is not open")
        answer = await self._client.request_json(method, path, body, timeout_s=_ANSWER_S)
        if not 200 <= answer.status < 300 and answer.status not in also:
            raise AgentProtocolError(f"it answers {method} {path} with {answer.status}: {_detail(answer.body)}")

    async def root_mounted(self) -> None:
        """Return once the guest has mounted its root filesystem.

        :raises AgentUnreachable: not yet, or it can't be asked. :raises RootFailed: it can't mount it, and says why.
        :raises AgentProtocolError: it does not know of any.
        """
        if self._client is None:
            raise AgentUnreachable("the channel to the guest is not open")
        answer = await self._client.request_json("GET", DAEMON_ROOT, timeout_s=_ROOT_S)
        said = answer.body if answer.status == 200 and isinstance(answer.body, dict) else {}
        match said.get("state"):
            case "mounted":
                return
            case "pending":
                raise AgentUnreachable("the root filesystem is not mounted yet")
            case "failed":
                raise RootFailed(f"the guest can't mount its root filesystem: {_detail(said)}")
            case _:
                raise AgentProtocolError("its initramfs mounts no root filesystem")

    async def become(
        self, hostname: str, machine_id: str, vm_id: int, *, protocol: int, as_it_is: bool = False
    ) -> None:
        """Tell a clone who it is, with fresh entropy and the time, and give it its manifest and its workload; return
        once it is that. `protocol`: the newest that its agent is known to speak. `as_it_is`: its workload may be ill,
        or have ended, as that of what it is a copy of.

        :raises AgentUnreachable: it can't be reached. :raises AgentProtocolError: it can't be that, and says why.
        """
        await self._opened.wait()
        if self._client is None or self._channel is None:
            raise AgentUnreachable("the channel to the guest is not open")
        # What is told has the time in it, so it is not told before there is somebody to hear it.
        await self._channel.ready()
        link = self._channel.link
        host, nic, hosts = self._host, self._neighbours.told(), self._neighbours.hosts()
        if nic is not None and protocol < IDENTITY_NETWORK_SINCE:
            await self._negotiate()
            protocol = self._protocol or protocol
            if protocol < IDENTITY_NETWORK_SINCE:
                raise AgentProtocolError("its agent is too old to be told what its network interface is to have")
        identity: dict[str, object] = {
            "hostname": hostname,
            "machine_id": machine_id,
            "vm_id": vm_id,
            "entropy": base64.b64encode(host.random.token_bytes(_ENTROPY_BYTES)).decode(),
            "time_ns": _now_ns(host),
            "signal": self._signal,
        }
        if nic is not None:
            identity["network"] = nic
        at_once = protocol >= IDENTITY_WORKLOAD_SINCE and self._manifest is not None
        if as_it_is and protocol >= IDENTITY_AS_IT_IS_SINCE:
            # The agent knows its manifest and its workload from what it is a copy of. It hears of them again as soon as
            # its output is asked for, as each agent does.
            identity["as_it_is"] = True
            link = None
        elif at_once:
            identity["manifest"] = self._manifest
            if self._workload is not None:
                identity["workload"] = self._workload
        try:
            said = await self._tell(DAEMON_IDENTITY, identity)
            self._agree(*_range(said.get("protocol")))
            shown = said["time_ns"]
        except _NotWell:
            if not as_it_is:
                raise
            # All but its workload is what it should be.
            at_once, shown = False, 0
            await self._negotiate()
        self._hosts = hosts
        # It was set to the time at which the request left, so it is behind by the way there, which is less than this.
        behind = _now_ns(host) - shown
        if not 0 <= behind <= _CLOCK_OFF_NS:
            # A way whose code the guest has run before takes a third of one that is new to it.
            await self._set_clock(_CLOCK_FIRST_TRIES, lead_ns=behind // 6)
        if at_once:
            self._handed_over, self._heard = True, link
            self._is_itself.set()
        else:
            await self.hand_over(agreed=True)

    async def _set_clock(self, tries: int = _CLOCK_TRIES, lead_ns: int = 0) -> None:
        async with self._setting_clock:
            self._clock_is_exact = await self._measure_clock(tries, max(0, min(lead_ns, _CLOCK_LEAD_NS)))

    async def _measure_clock(self, tries: int, lead_ns: int) -> bool:
        """Set it as well as the way to the guest allows; whether that is well enough. How far it is ahead is known to
        half of the way there and back, and a step by that may take as long as it likes to get there. So the shortest
        of some ways counts. `lead_ns`: how long the way there will take, as far as can be said."""
        told = {"time_ns": _now_ns(self._host) + lead_ns}
        shortest = _BECOME_S * 1e9
        for _ in range(tries):
            sent = _now_ns(self._host)
            try:
                shown = (await self._tell(DAEMON_CLOCK, told))["time_ns"]
            except AgentProtocolError:
                if "step_ns" not in told:
                    raise
                return True  # an agent that is too old for it
            way = _now_ns(self._host) - sent
            ahead = shown - sent - way // 2
            if abs(ahead) + way // 2 <= _CLOCK_OFF_NS:
                return True
            told = {"step_ns": -ahead if way < shortest else 0}
            shortest = min(shortest, way)
        if told["step_ns"]:
            await self._tell(DAEMON_CLOCK, told)
        return shortest // 2 <= _CLOCK_OFF_NS

    async def _mend_clock(self) -> None:
        """Set the clock of a copy again that was made while the host was busy, once no way to it is long. One copy at a
        time, and more and more seldom: else it would be this that keeps the host busy."""
        await self._is_itself.wait()
        pause_s = _CLOCK_AGAIN_S
        for _ in range(_CLOCK_MENDS):
            if self._clock_is_exact:
                return
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _CLOCK_AGAIN_MAX_S)
            with suppress(AgentUnreachable, AgentProtocolError):
                async with self._limited(self._mending):
                    await self.set_clock()

    async def _tell(self, path: str, body: object) -> dict[str, Any]:
        """`PUT` something that is answered, among others, by what the guest's clock shows.

        :raises AgentUnreachable: :raises AgentProtocolError:
        """
        if self._client is None:
            raise AgentUnreachable("the channel to the guest is not open")
        answer = await self._client.request_json("PUT", path, body, timeout_s=_BECOME_S)
        said = answer.body if isinstance(answer.body, dict) else {}
        if answer.status == 404:
            raise _NoSuchRoute(f"its agent does not know {path}")
        if answer.status == 503:
            raise _NotWell(f"it answers PUT {path}: {_detail(said)}")
        if answer.status != 200 or not _is_number(said.get("time_ns")):
            raise AgentProtocolError(f"it answers PUT {path} with {answer.status}: {_detail(said)}")
        return said

    async def _negotiate(self) -> None:
        """Agree on the newest protocol that both sides speak. :raises AgentUnreachable: it can't be asked.
        :raises AgentProtocolError: there is none, or it answers with nonsense.
        """
        if self._client is None:
            raise AgentUnreachable("the channel to the guest is not open")
        answer = await self._client.request_json("GET", INFO, timeout_s=_ANSWER_S)
        said = answer.body.get("protocol") if isinstance(answer.body, dict) else None
        # One that has no such route is as old as they come.
        self._agree(*((1, 1) if answer.status == 404 else _range(said)))

    def _agree(self, oldest: int, newest: int) -> None:
        """Agree with an agent that speaks these. :raises AgentProtocolError: there is none that both speak."""
        self.incompatible = self._protocol = None
        if oldest > PROTOCOL_VERSION or newest < PROTOCOL_MIN:
            ours = f"{PROTOCOL_MIN} to {PROTOCOL_VERSION}"
            self.incompatible = f"its agent speaks the protocols {oldest} to {newest}, this daemon {ours}"
            raise AgentProtocolError(self.incompatible)
        self._protocol = min(newest, PROTOCOL_VERSION)

    async def hand_over(self, *, agreed: bool = False) -> None:
        """Agree on a protocol with the agent, unless that has been done, and give it its manifest and its workload.
        From then on every agent of this boot gets them, as one that was restarted has none.

        :raises AgentUnreachable: :raises AgentProtocolError: as `ask` does.
        """
        link = None if self._channel is None else self._channel.link
        if not agreed:
            await self._negotiate()
        if self._neighbours.can_change and self._hosts is None:
            # Before its workload looks for them. One that can't keep them now is told again.
            with suppress(AgentProtocolError):
                await self._tell_hosts()
        if self._manifest is None:
            self._is_itself.set()
            return
        # An agent of an older guest has no use for it.
        await self.ask("PUT", DAEMON_MANIFEST, self._manifest, also=(404,))
        if self._workload is not None:
            await self.ask("PUT", DAEMON_WORKLOAD, self._workload)
        self._handed_over, self._heard = True, link
        self._is_itself.set()

    async def _tell_hosts(self) -> None:
        """Tell the guest who is in its network, unless its agent is too old for that. Raises as `ask` does."""
        # One after the other: the guest may be done with the later of two requests first.
        async with self._setting_hosts:
            hosts = self._neighbours.hosts()
            if hosts != self._hosts:
                # It may take what nobody waits for any more: until it answers, it has the one or the other.
                self._hosts = None
                await self.ask("PUT", DAEMON_HOSTS, {"hosts": dict(hosts)}, also=(404,))
                self._hosts = hosts

    @asynccontextmanager
    async def _limited(self, limiter: trio.CapacityLimiter) -> AsyncIterator[None]:
        """A block for which guests queue. A guest that hangs must not hold up the others: it does not join the queue
        before it has answered, and holds its place no longer than `_LIMITED_S`.

        :raises AgentUnreachable: it does not answer, or took too long. :raises AgentProtocolError: it answers nonsense.
        """
        await self._opened.wait()
        if self._channel is None:
            raise AgentUnreachable("the channel to the guest is not open")
        await self._channel.ready()
        await self.ask("GET", HEALTHZ)
        async with limiter:
            with trio.move_on_after(_LIMITED_S) as scope:
                yield
        if scope.cancelled_caught:
            raise AgentUnreachable(f"the agent was not done within {_LIMITED_S:g} s, and others wait")

    async def _keep_hosts(self) -> None:
        """Tell the guest whenever others are in its network; one that can't be told now hears of it later."""
        await self._is_itself.wait()
        pause_s = _HOSTS_PAUSE_S
        while True:
            if self._hosts is not None:
                await self._neighbours.changed(self._hosts)
            await trio.sleep(pause_s)
            try:
                async with self._limited(self._telling):
                    await self._tell_hosts()
                pause_s = _HOSTS_PAUSE_S
            except (AgentUnreachable, AgentProtocolError):
                pause_s = min(2 * pause_s, _HOSTS_AGAIN_MAX_S)

    async def console_tail(self) -> tuple[str, ...]:
        """The last lines that the console has said in this boot, all that was written so far included."""
        if self._console is not None:
            with trio.move_on_after(1.0):
                await self._console.drain()
        lines = self._log.tail_lines(_CONSOLE_LINES, source=console_source(self._boot_key))
        return tuple(line[:_CONSOLE_CHARACTERS] for line in lines)

    async def _watch(self) -> None:
        try:
            async with self._hypervisor.attach(self._spec, self.identity) as machine, trio.open_nursery() as nursery:
                nursery.start_soon(self._take, machine)
                kind, message = await _end_of(machine)
                nursery.cancel_scope.cancel()
        except HypervisorError as error:
            kind, message = EndKind.INTERNAL_ERROR, str(error)
        finally:
            self._machine = None
        reason = reason_of_end(kind, message, await self.console_tail())
        if kind in (EndKind.KILLED, EndKind.EXITED) and self._was_short_of_memory():
            kind, reason = EndKind.KILLED, Reason(_OUT_OF_MEMORY, f"{_SHORT}: {message}", reason.console)
        if reason.code == _CODES[EndKind.PANICKED]:
            # Not the reboot that it looked like.
            kind = EndKind.PANICKED
        await self._report(Ended(kind, reason))

    async def _take(self, machine: Machine) -> None:
        """See that the guest goes on, or stands still, as it should, before anybody has it: a daemon that was killed in
        the middle of something may have left it otherwise."""
        pause_s = _RETRY_MIN_S
        was_left = False
        while True:
            try:
                status = await machine.status()
                if self.stands_still and status == "running":
                    await machine.pause()
                elif not self.stands_still and status in PAUSED | NOT_STARTED:
                    was_left = True
                    await machine.resume()
                break
            except HypervisorError:
                # Whether it still answers at all is watched elsewhere.
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_MAX_S)
        self._machine = machine
        self._attached.set()
        if was_left and self._handed_over:
            with suppress(AgentUnreachable, AgentProtocolError):
                await self.set_clock()

    async def _keep_workload(self) -> None:
        """Report how the workload is, whenever that changes, at most once in `_WORKLOAD_PAUSE_S`."""
        await self._is_itself.wait()
        pause_s = _RETRY_MIN_S
        while True:
            began = trio.current_time()
            with suppress(AgentUnreachable, AgentProtocolError, ValueError):
                await self._opened.wait()
                if self._channel is not None and self._client is not None:
                    await self._channel.ready()
                    if not await self._follow_workload(self._client):
                        return  # its agent is too old
            if trio.current_time() - began >= _RETRY_MAX_S:
                pause_s = _RETRY_MIN_S
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 2, _RETRY_MAX_S)

    async def _follow_workload(self, client: AgentClient) -> bool:
        """False: the agent can't tell. Raises AgentUnreachable, AgentProtocolError, ValueError."""
        async with client.stream("GET", DAEMON_WATCH, timeout_s=_ANSWER_S, reserved=True) as response:
            if response.status == 404:
                return False
            if response.status != 200:
                raise AgentProtocolError(f"it answers GET {DAEMON_WATCH} with {response.status}")
            buffer = b""
            async for chunk in response:
                *lines, buffer = (buffer + chunk).split(b"\n")
                if len(buffer) > _MAX_STATUS:
                    raise AgentProtocolError("what it says of its workload has no end")
                # Only the newest counts: a guest may say more than anybody wants to keep.
                if lines:
                    await self._report(WorkloadChanged(workload_of(lines[-1])))
                    await trio.sleep(_WORKLOAD_PAUSE_S)
        return True

    async def _keep_channel(self) -> None:
        """Keep the way to the agent open; a link that breaks is made again by the channel itself."""
        async with open_channel(self._host, _agent_address(self._spec)) as channel:
            self._channel = channel
            channel.set_paused(self.stands_still)
            self._client = AgentClient(channel)
            self._opened.set()
            try:
                await self._keep_output(channel, self._client)
            finally:
                self._channel = self._client = None

    async def _keep_output(self, channel: Channel, client: AgentClient) -> None:
        """Carry the workload's output for as long as there is a channel."""
        pause_s = _RETRY_MIN_S
        log_id = ""
        if not self._is_itself.is_set():
            # Until then its output has the id of the template's; and then it has somebody to answer who waits for it.
            await self._is_itself.wait()
            await trio.sleep(_CLONE_OUTPUT_S)
        while True:
            await channel.ready()
            began = trio.current_time()
            try:
                if self._handed_over and (channel.link is None or channel.link != self._heard):
                    await self.hand_over()
                log_id = await pump_output(client, self._log, self._boot_key, log_id)
            except (AgentUnreachable, AgentProtocolError, ValueError) as error:
                # A guest that sends nonsense hurts its own log alone.
                self._output_error = str(error)
            if trio.current_time() - began >= _RETRY_MAX_S:
                pause_s = _RETRY_MIN_S
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 2, _RETRY_MAX_S)


def workload_of(said: bytes) -> WorkloadView | None:
    """What a line of the agent's says of its workload; None: there is none. :raises ValueError: it is no such line."""
    status = msgspec.json.decode(said, type=_Status)
    if status.state == "none":
        return None
    error = status.error
    if error is None and status.state == "failed":
        how = f"signal {status.signal}" if status.exit_code is None else f"exit code {status.exit_code}"
        error = f"it ended with {how}"
    return WorkloadView(status.state, status.exit_code, None if error is None else error[:_DETAIL_CHARACTERS])


class _Status(msgspec.Struct):
    """A line of `DAEMON_WATCH`; see `volant.model.agent_types.WorkloadStatus`."""

    state: WorkloadState
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    error: str | None = None


async def _end_of(machine: Machine) -> tuple[EndKind, str]:
    try:
        end = await machine.ended()
        return EndKind(end.kind), end.message
    except HypervisorError as error:
        return EndKind.INTERNAL_ERROR, str(error)


def reason_of_end(kind: EndKind, message: str, console: tuple[str, ...]) -> Reason:
    """Why a guest or its hypervisor ended, for people.

    A kernel that panics before it has the device to tell so reboots, as its command line says; then only its last
    words tell that from a reboot.
    """
    if kind in (EndKind.PANICKED, EndKind.RESET):
        for line in reversed(console):
            _, panic, why = line.partition(_PANIC)
            if panic:
                return Reason(_CODES[EndKind.PANICKED], f"the guest's kernel panicked{why}", console)
    return Reason(_CODES[kind], message, console)


def bounds_of(spec: MachineSpec) -> ResourceLimits:
    """What the hypervisor's process of a machine may take of the host."""
    return ResourceLimits(
        memory_mb=spec.memory_mb + CEILING_MB,
        cpus=spec.cpu_cores + 1,
        weight=min(_MAX_WEIGHT, 100 * spec.cpu_cores),
        tasks=_TASKS + spec.cpu_cores,
    )


def _now_ns(host: Host) -> int:
    return int(host.clock.now().timestamp() * 1e6) * 1000


def _range(said: object) -> tuple[int, int]:
    """:raises AgentProtocolError: an agent does not say so."""
    if isinstance(said, dict):
        oldest, newest = said.get("min"), said.get("max")
        if _is_number(oldest) and _is_number(newest) and oldest <= newest:
            return oldest, newest
    raise AgentProtocolError("it does not say which protocols it speaks")


def _is_number(said: object) -> TypeGuard[int]:
    """Whether it is a number as an agent says them. JSON's may have thousands of digits."""
    return type(said) is int and 0 <= said < 2**63


def _detail(said: object) -> str:
    """What a guest says of what went wrong; it gets into rows, events and logs, so no more than people would read."""
    return str(said.get("detail"))[:_DETAIL_CHARACTERS] if isinstance(said, dict) else ""


def _agent_address(spec: MachineSpec) -> Address:
    return VirtioSerial(spec.agent_path) if spec.vsock_cid is None else Vsock(spec.vsock_cid)


_CODES = {
    EndKind.SHUTDOWN: GUEST_SHUTDOWN,
    EndKind.RESET: "guest_reset",
    EndKind.PANICKED: "guest_panicked",
    EndKind.KILLED: "hypervisor_killed",
    EndKind.EXITED: "hypervisor_exited",
    EndKind.INTERNAL_ERROR: "hypervisor_error",
    EndKind.GONE: "hypervisor_gone",
}
"""Reason codes; public."""
