"""Runs the steps of one VM: each changes its process, files or guest towards the wanted state, and returns its outcome.
`VmActor` decides which step runs."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
import trio

from actors import TaskHandle
from volant.channel import AgentProtocolError, AgentUnreachable
from volant.directories import DirectoryFailed
from volant.host import ProcessGone
from volant.hypervisor import HypervisorError, LaunchFailed, MachineSpec
from volant.logs import VmLog
from volant.model import (
    AgentAnswered,
    AskStop,
    AwaitAgent,
    Cleared,
    Effect,
    Hold,
    ImageReady,
    Kill,
    Launch,
    Launched,
    Pause,
    Paused,
    PrepareImage,
    Problem,
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
    StepFailed,
    VmRow,
    is_checkpoint,
)
from volant.model.agent import DAEMON_SHUTDOWN, HEALTHZ
from volant.session import ConsolePump, RootFailed, SecretsFailed, VolumesFailed
from volant.templates import Claim, WarmProcess, standby_directory, template_layer

from ._boot_limiter import SLOT_S
from ._deps import VmDeps
from ._fence import FenceFailed
from ._layout import LAYER, layer_directory, tag_of
from ._machine_spec import machine_id, machine_spec
from ._process import VmProcess, bounds_of
from .messages import StepError

_AGENT_RETRY_S = 0.05
_PAUSE_S = 45.0
"""The deadline of a pause. QEMU pauses a guest after the disk has all of the guest's writes."""
_RESUME_S = 60.0
"""The deadline of a resume, including the guest's clock, for which its agent must answer."""
_CLONE_S = 30.0
"""The deadline for the identity of a clone, which then boots cold instead. It is shorter than an agent's deadline."""
_logger = logging.getLogger("volant.vm")


class VmState(msgspec.Struct):
    """The state of one incarnation of the actor about its VM. The actor changes it, and its steps read it."""

    row: VmRow
    log: VmLog
    process: VmProcess | None = None
    process_task: TaskHandle | None = None
    fresh_tag: str = ""
    """The tag of a process that can't have been started yet."""
    warm_process: WarmProcess | None = None
    """The warm process of this boot."""

    def running_process(self) -> VmProcess:
        """Returns the process of the row. :raises AgentUnreachable: the row has no process any more."""
        if self.process is None:
            raise AgentUnreachable("the hypervisor's process is gone")
        return self.process


class Steps:
    """The steps of one VM."""

    def __init__(self, deps: VmDeps, vm: VmState) -> None:
        self._deps = deps
        self._vm = vm

    def limit_s(self, effect: Effect) -> float | None:
        """Returns the deadline of a step, in seconds. None if its parts have their own, or if it waits for other
        VMs."""
        settings = self._deps.settings
        match effect:
            case Launch():
                return settings.launch_timeout_s
            case AwaitAgent():
                return settings.agent_timeout_s
            case Pause():
                return _PAUSE_S
            case Resume():
                return _RESUME_S
            case AskStop(grace_s=grace_s):
                return grace_s
            case Kill():
                return settings.kill_timeout_s
            case RestartLater(delay_s):
                return delay_s
            case _:
                return None

    async def run(self, effect: Effect) -> Seen:
        """Runs a step, and returns its outcome."""
        row = self._vm.row
        try:
            match effect:
                case PrepareImage():
                    return await self._prepare(row)
                case Launch(tag):
                    return await self._launch(row, tag)
                case AwaitAgent():
                    return await self._await_agent(row)
                case Pause():
                    return await self._pause()
                case Resume():
                    return await self._resume()
                case AskStop(grace_s=grace_s):
                    return await self._ask_stop(row, grace_s)
                case Kill(tag):
                    return await self._kill(row, tag)
                case Remove():
                    return await self._remove(row)
                case RestartLater(delay_s):
                    await trio.sleep(delay_s)
                    return RestartDue()
                case Hold():
                    await self._deps.store.projection.undrained()
                    if row.movable is not None:
                        await self._deps.fence.opened()
                    return Released()
        except (LaunchFailed, StepError) as error:
            process = self._vm.process
            console = await process.console_tail() if process is not None else ()
            return StepFailed(Reason(error.code, str(error), console))

    async def _prepare(self, row: VmRow) -> Seen:
        deps, settings = self._deps, self._deps.settings
        image, template, origin, warm_process = await deps.preparation.prepare(row)
        # VMs that are created at once begin to start in any order. Later the row says since when a boot is due.
        due_at = row.updated_at if row.boots else row.created_at
        await deps.slots.of(template).acquire(row.id, due=(due_at.timestamp(), row.id))
        socket = machine_spec(settings, row, "tcg").console_socket_path
        tag = self._vm.fresh_tag = tag_of(deps.instance, row)
        if warm_process is not None:
            tag = warm_process.tag
        # A copy has the balloon that its origin has. A template has none, and neither have its clones.
        balloon = row.balloon if row.checkpoint is not None else template is None and settings.return_memory
        return ImageReady(image, tag, str(socket), template, origin, balloon)

    # Launch

    async def _launch(self, row: VmRow, tag: str) -> Seen:
        # One that was frozen is found or launched again once it may run.
        return await self._unless_frozen(row, partial(self._launch_now, row, tag))

    async def _unless_frozen(self, row: VmRow, step: Callable[[], Awaitable[Seen]]) -> Seen:
        """Runs a step once the VM may run. A step that fails because the VM was frozen in between is repeated."""
        if row.movable is None:
            return await step()
        fence = self._deps.fence
        while True:
            await fence.opened()
            before = fence.times_closed
            try:
                return await step()
            except (LaunchFailed, StepError):
                # It may be open again already.
                if fence.is_open and fence.times_closed == before:
                    raise

    async def _launch_now(self, row: VmRow, tag: str) -> Seen:
        deps, vm = self._deps, self._vm
        fresh, vm.fresh_tag = tag == vm.fresh_tag, ""
        accelerator = await deps.hypervisor.accelerator()
        spec = machine_spec(deps.settings, row, accelerator)
        with _deadline(deps.settings.launch_timeout_s, "launch_timeout", "the hypervisor was not up in time"):
            await deps.networks.attach(row)
            if deps.warm_pool.is_one(tag):
                identity = await self._claim(row, spec)
            else:
                # An earlier incarnation may have been killed between the launch and its commit. Where there was none,
                # reading all of /proc would cost as much as a launch.
                identity = None if fresh else await self._finish_launch(row, spec)
            if identity is None:
                if spec.root is not None and row.template is not None and (deps.warm_pool.is_one(tag) or not fresh):
                    # A process that ran may have written to it.
                    await deps.hypervisor.make_layer(spec.root, self._layer_of(row.template))
                identity = await self._start_machine(row, spec)
                await deps.networks.note_connected(row)
        return Launched(identity, deps.hypervisor.name, accelerator)

    async def _claim(self, row: VmRow, spec: MachineSpec) -> ProcessIdentity | None:
        """Claims the warm process of the row. Returns None if it can't continue; the process is then ended."""
        deps, mine = self._deps, self._vm.warm_process
        is_mine = mine is not None and mine.tag == spec.tag
        identity = mine.identity if mine is not None and is_mine else await deps.host.processes.find(spec.tag)
        if identity is None:
            return None
        try:
            claimed = await deps.warm_pool.claim(spec, Claim(row.boots, row.name, row.layer, spec.nic))
        except OSError as error:
            raise StepError("launch_failed", f"a warm process that can't be claimed can't be ended: {error}") from error
        if not claimed:
            await deps.networks.reattach(row)
            return None
        if is_mine:
            # Else an earlier daemon may have claimed it, and its passt may have ended since.
            await deps.networks.note_connected(row)
        return identity

    async def _finish_launch(self, row: VmRow, spec: MachineSpec) -> ProcessIdentity | None:
        """Finds a machine that an earlier incarnation launched, in any state, and lets it run. Returns None if there is
        none, or if it can't run and is ended."""
        host = self._deps.host
        identity = await host.processes.find(spec.tag)
        if identity is None:
            return None
        try:
            await self._let_run(row, spec, identity)
            return identity
        except (HypervisorError, FenceFailed) as error:
            _logger.warning(
                "VM %s: the process %d, which an earlier daemon launched, can't run, and is launched again: %s",
                spec.name, identity.pid, error, extra={"vm": spec.name},
            )  # fmt: skip
        with suppress(ProcessGone), host.processes.open(identity) as process:
            process.kill()
            await process.wait()
        await self._deps.networks.reattach(row)
        return None

    async def _start_machine(self, row: VmRow, spec: MachineSpec) -> ProcessIdentity:
        """Launches a machine. If memory is short, the warm pool is emptied and the build of a template is aborted."""
        warm_pool = self._deps.warm_pool
        try:
            return await self._launch_machine(row, spec)
        except LaunchFailed as error:
            if error.code != "memory_refused":
                raise
            gave_way = await warm_pool.give_way()
            if not await self._deps.templates.give_way() and not gave_way:
                raise
        return await self._launch_machine(row, spec)

    async def _launch_machine(self, row: VmRow, spec: MachineSpec) -> ProcessIdentity:
        """Launches a machine, with one virtiofsd for each of its directories, because each serves only one machine."""
        virtiofsd = self._deps.virtiofsd
        try:
            started = await virtiofsd.start(row)
        except DirectoryFailed as error:
            raise StepError(error.code, str(error)) from error
        try:
            if row.movable is None:
                return await self._deps.hypervisor.launch(spec)
            return await self._launch_fenced(row, spec)
        except LaunchFailed as error:
            if error.code != "memory_refused" and (why := await virtiofsd.explain(row, started)):
                raise StepError("virtiofsd_failed", why) from error
            raise

    async def _launch_fenced(self, row: VmRow, spec: MachineSpec) -> ProcessIdentity:
        """Launches the machine of a VM that another host may start: its guest runs once its process is behind the
        fence."""
        identity = await self._deps.hypervisor.launch(msgspec.structs.replace(spec, start_paused=True))
        try:
            await self._let_run(row, spec, identity)
        except (HypervisorError, FenceFailed) as error:
            await self._deps.host.processes.end_all(spec.tag, identity)
            raise StepError("fence_failed", f"the guest must not run: {error}") from error
        return identity

    async def _let_run(self, row: VmRow, spec: MachineSpec, identity: ProcessIdentity) -> None:
        """:raises HypervisorError: :raises FenceFailed:"""
        if row.movable is not None:
            await self._deps.fence.enclose(row, identity, bounds_of(spec))
        async with self._deps.hypervisor.attach(spec, identity) as machine:
            await machine.resume()

    def _layer_of(self, template: str) -> Path:
        """Returns the layer of the template's or checkpoint's guest when it was saved."""
        if is_checkpoint(template):
            return self._deps.checkpoints.at(template) / LAYER
        return template_layer(self._deps.settings.template_dir, template)

    # The guest

    async def _await_agent(self, row: VmRow) -> Seen:
        # A frozen guest answers nothing.
        return await self._unless_frozen(row, partial(self._await_agent_now, row))

    async def _await_agent_now(self, row: VmRow) -> Seen:
        settings, is_clone = self._deps.settings, row.template is not None
        timeout_s = min(_CLONE_S, settings.agent_timeout_s) if is_clone else settings.agent_timeout_s
        slot_ends_at = trio.current_time() + SLOT_S
        last = ""
        with trio.move_on_after(timeout_s):
            while True:
                if trio.current_time() >= slot_ends_at:
                    self._deps.slots.release(row.id)
                try:
                    await self._set_up_guest(row)
                    return AgentAnswered()
                except AgentUnreachable as error:
                    last = f": {error}"
                    await trio.sleep(_AGENT_RETRY_S)
                except RootFailed as error:
                    raise StepError("rootfs_failed", str(error)) from error
                except VolumesFailed as error:
                    raise StepError("volume_failed", str(error)) from error
                except SecretsFailed as error:
                    raise StepError(error.code, str(error)) from error
                except AgentProtocolError as error:
                    refused = "clone_refused" if is_clone else "agent_refused"
                    raise StepError(refused, f"the agent answered, but not as it should: {error}") from error
        code = "clone_timeout" if is_clone else "agent_timeout"
        raise StepError(code, f"the agent in the guest did not answer within {timeout_s:g} s{last}")

    async def _set_up_guest(self, row: VmRow) -> None:
        """:raises AgentUnreachable: :raises AgentProtocolError: :raises RootFailed: :raises VolumesFailed:
        :raises SecretsFailed:"""
        agent = self._vm.running_process().agent
        if row.template is not None:
            is_copy = row.checkpoint is not None
            protocol = (self._deps.checkpoints if is_copy else self._deps.templates.template_store).protocol(
                row.template
            )
            own_id = machine_id(self._deps.instance, row)
            await agent.assign_identity(row.name, own_id, row.id, protocol=protocol, as_it_is=is_copy)
        else:
            await agent.connection.ask("GET", HEALTHZ)
            if row.layer:
                await agent.root_mounted()
            await agent.configure()
            agent.clock.doubt()

    async def _pause(self) -> Seen:
        try:
            with _deadline(_PAUSE_S, "pause_failed", f"the guest was not paused within {_PAUSE_S:g} s"):
                await self._vm.running_process().pause()
        except (AgentUnreachable, HypervisorError) as error:
            raise StepError("pause_failed", f"the guest can't be paused: {error}") from error
        return Paused()

    async def _resume(self) -> Seen:
        try:
            with _deadline(_RESUME_S, "resume_failed", f"the guest was not resumed within {_RESUME_S:g} s"):
                process = self._vm.running_process()
                await process.resume()
                try:
                    await process.agent.clock.set()
                except (AgentUnreachable, AgentProtocolError) as error:
                    return Resumed(Reason("clock_not_set", f"the guest runs, but its clock may be behind: {error}"))
        except (AgentUnreachable, HypervisorError) as error:
            raise StepError("resume_failed", f"the guest can't be resumed: {error}") from error
        return Resumed()

    async def _ask_stop(self, row: VmRow, grace_s: float) -> Seen:
        """Asks the guest to shut down. When it has, the watch on the process reports that, and this step is
        cancelled."""
        with trio.move_on_after(grace_s):
            try:
                process = self._vm.running_process()
                if process.paused:
                    with suppress(HypervisorError):
                        await process.resume()
                # The agent gives up before this step does, so that a stubborn process does not cost the guest its sync.
                await process.agent.connection.ask("POST", DAEMON_SHUTDOWN, {"grace_s": grace_s * 0.8})
            except (AgentUnreachable, AgentProtocolError) as error:
                # It may have received the request all the same.
                text = "VM %s: no proper answer to the request to stop: %s"
                _logger.info(text, row.name, error, extra={"vm": row.name})
            await trio.sleep_forever()
        return StepFailed(Reason("grace_over", f"the guest did not stop within {grace_s:g} s and is killed"))

    # The end

    async def _kill(self, row: VmRow, tag: str) -> Seen:
        """Ends the process and removes its files. The log gets the rest of the console."""
        host, settings, vm = self._deps.host, self._deps.settings, self._vm
        with _deadline(settings.kill_timeout_s, "unkillable", "the hypervisor's process does not end, although killed"):
            # The row's process is known beyond doubt; others with its tag were launched by a daemon that died.
            known = row.process if row.process is not None and row.process.tag == tag else None
            try:
                await host.processes.end_all(tag, known)
            except OSError as error:
                # The host is short of descriptors, say.
                raise StepError("unkillable", f"the hypervisor's process can't be ended: {error}") from error
        if vm.process_task is not None:
            vm.process_task.cancel()
            await vm.process_task.wait()
        await self._deps.networks.detach(row)
        if row.directories:
            try:
                await self._deps.virtiofsd.end(row.id)
            except DirectoryFailed as error:
                raise StepError("not_removed", str(error)) from error
        spec = machine_spec(settings, row, row.accelerator or "tcg")
        with suppress(FileNotFoundError), ConsolePump(host, spec.console_path, vm.log, row.boot_key) as console:
            await console.finish()
        try:
            await host.limits.remove_empty()
            await host.files.remove_tree(spec.directory)
            await host.files.remove_tree(spec.memory_file)
            if self._deps.warm_pool.is_one(tag):
                await self._deps.warm_pool.disconnect(tag)
                await host.files.remove_tree(standby_directory(settings.runtime_dir, tag))
        except OSError as error:
            raise StepError("not_removed", f"files of the VM can't be removed: {error}") from error
        return Cleared()

    async def _remove(self, row: VmRow) -> Seen:
        """Removes all resources of the VM except its row."""
        if row.movable is not None or row.arrived:
            try:
                await self._deps.fence.withdraw(row)
            except Problem as problem:
                raise StepError("not_withdrawn", problem.detail) from problem
        if row.layer:
            try:
                await self._deps.host.files.remove_tree(layer_directory(self._deps.settings, row))
            except OSError as error:
                raise StepError("not_removed", f"the VM's disk can't be removed: {error}") from error
        try:
            await self._deps.logs.forget(row.id)
        except OSError as error:
            raise StepError("not_removed", f"the VM's log can't be ended: {error}") from error
        return Removed()


@contextmanager
def _deadline(timeout_s: float, code: str, message: str) -> Iterator[None]:
    """:raises StepError: the block took longer."""
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise StepError(code, message)
