"""`volar run`: a VM from an OCI image, which runs one program like a command on this host, or in the background.

In the foreground the program waits in the VM until volar has attached to it. So it has volar's terminal, input and
signals, and no output is lost. It is the VM's workload: it has a state, events, a health check and a log, and when it
has ended, the daemon stops or deletes the VM. It keeps running if volar is killed, and volar attaches again after a
restart of the daemon.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import click
import msgspec
import trio

from volant.client import ClientError, ConnectionLost, ExecEnd, ExecSession, Waited
from volant.concurrency import open_helpers
from volant.model import CreateVm, Egress, Failover, Problem, PullImage, Replicate, Status, VmView

from ._complete import network_choices
from ._create import generated_name, replicate_option
from ._exec import exit_code, need_terminal, pass_on, terminal_size
from ._guest import once_running
from ._image_options import image_members, image_options, registry_options
from ._options import Size, egress_option, volume_option
from ._pulls import showing_pull
from ._registry_auth import registry_auth
from ._run import NOT_RUN, Failure, Pair, Passing
from ._stock_offer import stock_instead
from ._streaming import Session, command
from ._terminal import raw
from ._text import safe
from ._variables import env_file_option, env_option, env_secret_option, secret_option, variables, with_secrets
from ._vm_output import reason_lines, warn

_START_S = 3600.0
"""How long to wait for a VM. Half an hour of this is for its image; the daemon's limits end the wait earlier."""
_CLEAN_S = 75.0
"""How long the daemon may take to stop or delete a VM."""
_ATTACH_AGAIN_S = 30.0
"""How long to try to attach again after the connection broke, long enough for a restart of the daemon."""
_AGAIN_S = 0.5
_GRACE_S = 10.0
"""How long the program may run after SIGTERM or SIGHUP, the same as the default of `docker stop`."""
_INTERRUPTS = 3
"""The number of Ctrl-C that kills a program, the same as in Docker."""
_NAMES = 8
"""Attempts at a generated name that is not in use."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
_RESTARTS: dict[str, Literal["never", "on-failure", "always"]] = {
    "no": "never",
    "on-failure": "on-failure",
    "always": "always",
    "unless-stopped": "always",
}


class _Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command besides the VM itself."""

    request: CreateVm
    image: str
    named: bool
    """Whether the user has given the name."""
    auth: str | None
    pull: str
    interactive: bool
    tty: bool
    remove: bool


@command(
    None,
    "run",
    cls=Passing,
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
    no_args_is_help=True,
)
@click.argument("image")
@click.argument("words", metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED)
@click.option("-i", "--interactive", is_flag=True, help="Send standard input to the program.")
@click.option("-t", "--tty", is_flag=True, help="Give the program a terminal.")
@click.option("--rm", "remove", is_flag=True, help="Delete the VM after the program has ended or the VM was stopped.")
@click.option("-d", "--detach", is_flag=True, help="Print the VM's name once it is running, and exit.")
@click.option("--name", help="The VM's name.  [default: two words]")
@click.option(
    "-p",
    "--publish",
    "ports",
    multiple=True,
    metavar="[HOST:]PORT:GUEST_PORT[/udp]",
    help="Publish a port of the VM on the host, on 127.0.0.1 without HOST; may be repeated.",
)
@env_option
@env_file_option
@env_secret_option
@secret_option
@volume_option
@egress_option("the VM", default="what its project allows")
@image_options
@click.option("-m", "--memory", "memory_mb", type=Size(64), metavar="SIZE", help="Memory: 512M, 2G.  [default: 512M]")
@click.option("--cpus", "cpu_cores", type=click.IntRange(min=1), help="vCPUs.  [default: 1]")
@click.option("--disk", "disk_mb", type=Size(), metavar="SIZE", help="Size of the disk.  [default: 10G]")
@click.option("-l", "--label", "labels", type=Pair(), multiple=True, help="KEY=VALUE; may be repeated.")
@click.option(
    "--network",
    shell_complete=network_choices,
    help="none, bridge, user, or a network's name.  [default: the daemon's setting]",
)
@click.option(
    "--restart", type=click.Choice(list(_RESTARTS)), default="no", show_default=True,
    help="With -d: when the daemon starts the VM again.",
)  # fmt: skip
@click.option(
    "--failover", type=click.Choice(["never", "restart", "restore"]), default="never", show_default=True,
    help="With -d: if its host fails, another host of the fleet boots it (restart) or continues it (restore).",
)  # fmt: skip
@replicate_option
@click.option(
    "--pull",
    type=click.Choice(["missing", "always", "never"]),
    default="missing",
    show_default=True,
    help="Whether to ask the registry: if the tag is not in the cache, always, or never.",
)
@registry_options
async def run(
    session: Session,
    /,
    image: str,
    words: tuple[str, ...],
    interactive: bool,
    tty: bool,
    remove: bool,
    detach: bool,
    name: str | None,
    ports: tuple[str, ...],
    env: tuple[str, ...],
    env_files: tuple[Path, ...],
    env_secrets: tuple[tuple[str, str], ...],
    secrets: tuple[str, ...],
    volumes: tuple[str, ...],
    egress: Egress | None,
    memory_mb: int | None,
    cpu_cores: int | None,
    disk_mb: int | None,
    labels: tuple[tuple[str, str], ...],
    network: str | None,
    restart: str,
    failover: Failover,
    replicate: Replicate | None,
    pull: str,
    authfile: Path | None,
    registry_secret: str | None,
    **program: Any,
) -> int:
    """Run a program of an OCI image in a new VM. Put options before IMAGE.

    Without -d volar passes on output, signals and the exit code, and with -i input; use -it for a shell. When the
    program has ended, the VM stops, or with --rm is deleted. `volar ps -a` also shows stopped VMs.

    The exit code is the program's, 128 + n if signal n ended it, 126 or 127 if it can't be executed or does not exist,
    125 if volar or the daemon failed.
    """
    if detach and (interactive or tty):
        raise click.UsageError("-i and -t do not work with -d; `volar exec -it` opens a shell in a VM that runs")
    if restart != "no" and not detach:
        raise click.UsageError("--restart needs -d: in the foreground the VM ends with its program")
    if (failover != "never" or replicate is not None) and not detach:
        raise click.UsageError("--failover needs -d: in the foreground the VM ends with its program")
    if interactive and tty:
        need_terminal()
    environ = variables(env, env_files)
    request = CreateVm(
        name=name or generated_name(),
        image=image,
        registry_secret=registry_secret,
        attach=not detach,
        on_exit="delete" if remove else "stop",
        **image_members(words, **program),
        env=with_secrets(environ, env_secrets),
        secrets=secrets,
        labels=dict(labels),
        cpu_cores=cpu_cores,
        memory_mb=memory_mb,
        disk_mb=disk_mb,
        network=network,
        ports=ports,
        volumes=volumes,
        egress=egress,
        restart_policy=_RESTARTS[restart],
        failover=failover,
        replicate=replicate,
    )
    auth = await trio.to_thread.run_sync(registry_auth, image, authfile, registry_secret, abandon_on_cancel=True)
    wanted = _Wanted(
        request=request, image=image, named=name is not None, auth=auth, pull=pull,
        interactive=interactive, tty=tty, remove=remove,
    )  # fmt: skip
    if detach:
        return await _detached(session, wanted)
    return await _Foreground(session, wanted).run()


async def _detached(session: Session, wanted: _Wanted) -> int:
    await _prepare(session, wanted)
    vm = await _create(session, wanted)
    try:
        vm = await _until_running(session, vm, wanted.image) or vm
    except trio.Cancelled:
        session.out.note(f"volar: VM {vm.name} keeps starting; `volar rm -f {vm.name}` deletes it")
        raise
    session.out.result(vm, safe(vm.name))
    return 0


class _Foreground:
    """One program in the foreground: from the request for its VM to the VM's end."""

    def __init__(self, session: Session, wanted: _Wanted) -> None:
        self._session = session
        self._wanted = wanted
        self._vm: VmView | None = None
        self._process: ExecSession | None = None
        self._at_the_end: Literal["end", "wait", "leave"] = "end"
        """The treatment of the VM at the end: end it; wait until the daemon has ended it, as its program has ended; or
        leave it running."""
        self._scope = trio.CancelScope()
        self._ended_by: int | None = None
        self._interrupts = 0

    async def run(self) -> int:
        """Runs the program, and returns the exit code."""
        code = NOT_RUN
        async with open_helpers() as helpers:
            await helpers.start(self._watch_signals, helpers)
            try:
                with self._scope:
                    code = await self._run()
            finally:
                # Whatever has ended it, a second signal too.
                with trio.CancelScope(shield=True):
                    await self._clean_up()
        return code if self._ended_by is None else 128 + self._ended_by

    async def _run(self) -> int:
        session, wanted = self._session, self._wanted
        await _prepare(session, wanted)
        vm = self._vm = await _create(session, wanted)
        await trio.lowlevel.checkpoint_if_cancelled()
        name = vm.name
        await _until_running(session, vm, wanted.image, keep=not wanted.remove)
        terminal = wanted.tty and wanted.interactive
        with raw(sys.stdin.fileno()) if terminal else nullcontext():
            try:
                end = await once_running(session, name, lambda: self._start(name))
            except Problem as problem:
                if problem.code == "taken-over":
                    self._at_the_end = "leave"
                raise
        if end.code != "invalid_request":
            self._at_the_end = "wait"
        return exit_code(session, end)

    async def _start(self, name: str) -> ExecEnd:
        """Starts the program and stays attached to it; returns how it ended."""
        wanted, environ = self._wanted, dict[str, str]()
        if wanted.tty and "TERM" not in wanted.request.env and os.environ.get("TERM"):
            environ["TERM"] = os.environ["TERM"]
        rows, cols = terminal_size() or (24, 80)
        vms = self._session.client.vms
        async with vms.attach_workload(name, tty=wanted.tty, rows=rows, cols=cols, env=environ) as process:
            if not wanted.interactive and not wanted.tty and process.end is None:
                await process.send_eof()
            lost = await self._talk(process)
        if lost is not None:
            process = await self._attach_again(name, process, lost)
        assert process.end is not None
        return process.end

    async def _talk(self, process: ExecSession) -> ConnectionLost | None:
        """Passes everything on until the program has ended. Returns None, or the lost connection if the program's state
        is unknown."""
        wanted = self._wanted
        self._process = process
        try:
            await pass_on(
                self._session, process, wanted.interactive, wanted.tty and wanted.interactive, endings=False
            )  # fmt: skip
        except ConnectionLost as lost:
            return lost
        finally:
            self._process = None
        return None

    async def _attach_again(self, name: str, process: ExecSession, lost: ConnectionLost) -> ExecSession:
        """Attaches to a program whose connection broke, for example by a restart of the daemon; returns the session
        that saw its end.

        :raises ConnectionLost: it can't. The program keeps running if its VM does.
        """
        vms, identifier = self._session.client.vms, process.id
        give_up_at = trio.current_time() + _ATTACH_AGAIN_S
        while identifier is not None and trio.current_time() < give_up_at:
            try:
                with trio.fail_at(give_up_at) as opening:
                    async with vms.attach(name, identifier, position=process.position) as process:
                        opening.deadline = math.inf
                        if await self._talk(process) is None:
                            return process
                        give_up_at = trio.current_time() + _ATTACH_AGAIN_S
            except (ClientError, trio.TooSlowError):
                pass
            except Problem as problem:
                if problem.status < 500:
                    raise
            await trio.sleep(_AGAIN_S)
        self._at_the_end = "leave"
        hint = f"if the VM runs, the program keeps running: `volar exec --attach {identifier} {name}`"
        raise ConnectionLost(lost.detail, hint=hint) from lost

    async def _watch_signals(
        self, helpers: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Passes signals on to the program. Before it runs, and if it does not end, they end the command."""
        # `nohup`, and shells for jobs in the background, let signals be ignored.
        heard = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
        with trio.open_signal_receiver(*heard) as signals:
            task_status.started()
            async for number in signals:
                process = self._process
                if process is None:
                    if number in _ENDING:
                        self._end(number)
                    continue
                self._interrupts += number == signal.SIGINT
                if self._interrupts >= _INTERRUPTS:
                    self._end(number)
                with suppress(ConnectionLost):
                    await process.signal(number)
                if number in (signal.SIGTERM, signal.SIGHUP):
                    helpers.start_soon(self._end_later, number)

    async def _end_later(self, number: int) -> None:
        await trio.sleep(_GRACE_S)
        self._end(number)

    def _end(self, number: int) -> None:
        if self._ended_by is None:
            self._ended_by = number
        self._scope.cancel()

    async def _clean_up(self) -> None:
        """Ends the VM, or waits until the daemon has ended it. Errors are only reported."""
        vm = self._vm
        if vm is None or self._at_the_end == "leave":
            return
        remove = self._wanted.remove
        vms = self._session.client.vms
        try:
            with trio.fail_after(_CLEAN_S):
                if self._at_the_end == "wait" and await self._is_over(vm):
                    return
                if remove:
                    await vms.delete(vm.name)
                else:
                    await vms.stop(vm.name)
        except (Problem, ClientError, trio.TooSlowError) as error:
            if isinstance(error, Problem) and error.status == 404:
                return
            why = str(error) or f"it took longer than {_CLEAN_S:g} s"
            word = "deleted" if remove else "stopped"
            self._session.out.note(f"volar: VM {vm.name} is not {word}: {why}")
            self._session.out.note(f"  `volar {'rm -f' if remove else 'stop'} {vm.name}` does it later")

    async def _is_over(self, vm: VmView) -> bool:
        """Waits for the end of a VM whose program has ended; returns whether no clean-up is left."""
        remove = self._wanted.remove
        states = (Status.CRASHED, "deleted") if remove else (Status.CRASHED, "deleted", Status.STOPPED)
        waited = await self._session.client.vms.wait(vm.name, states, timeout_s=_CLEAN_S / 2)
        now = waited.vm
        if now is None or now.id != vm.id:
            return True
        # A VM that is deleted during the wait is shown as it was before.
        return waited.outcome == "met" and not (remove and now.status is Status.CRASHED)


async def _prepare(session: Session, wanted: _Wanted) -> None:
    """Applies `--pull`. :raises Failure: `--pull never`, and the image is not in the cache."""
    client = session.client
    if wanted.pull == "always":
        async with showing_pull(client, session.out, wanted.image):
            pull = PullImage(wanted.image, refresh=True, registry_secret=wanted.request.registry_secret)
            await client.images.pull(pull, registry_auth=wanted.auth)
    elif wanted.pull == "never" and not await client.images.list(reference=wanted.image):
        raise Failure(
            f"the image {wanted.image!r} is not in the cache, and --pull is never",
            hint=f"`volar images pull {wanted.image}` fetches it",
        )


async def _create(session: Session, wanted: _Wanted) -> VmView:
    """Creates the VM, with another name if the generated one is in use, or from a stock image if no registry can be
    reached and the user agrees. It can't be cancelled between the daemon's answer and its return."""
    request = wanted.request
    for attempt in range(_NAMES):
        try:
            with trio.CancelScope(shield=True):
                # A request that was cut off may have made a VM, which nobody would delete. It has its own deadline.
                vm = await session.client.vms.create(request, registry_auth=wanted.auth)
        except Problem as problem:
            last = attempt == _NAMES - 1
            if problem.code == "registry-unreachable" and request.image == wanted.image and not last:
                request = msgspec.structs.replace(request, image=await stock_instead(session, wanted.image, problem))
                continue
            if problem.code != "name-taken" or wanted.named or last:
                raise
            request = msgspec.structs.replace(request, name=generated_name())
        else:
            warn(session.out, vm)
            return vm
    raise AssertionError("unreachable")


async def _until_running(session: Session, vm: VmView, image: str, keep: bool = True) -> VmView | None:
    """Waits until a VM is running, and shows the fetch of its image. Returns None if it has run and was deleted.

    :param image: its reference as the user wrote it
    :param keep: whether the VM exists afterwards, so that its log can be read
    :raises Failure: the VM does not run
    """
    digest = None if vm.image is None else vm.image.digest
    async with showing_pull(session.client, session.out, image, digest):
        waited: Waited = await session.client.vms.wait(vm.name, (Status.RUNNING,), timeout_s=_START_S)
    if waited.outcome == "met" and waited.vm is not None:
        return waited.vm
    if _has_run(waited):
        return waited.vm
    if waited.outcome == "timeout":
        raise Failure(f"VM {vm.name!r} does not run after {_START_S:g} s")
    state = "deleted" if waited.vm is None else str(waited.vm.status)
    reason = None if waited.vm is None else waited.vm.reason
    if not keep and reason is not None and not session.out.json:
        session.out.note(reason_lines(reason))
    why = f": {reason.message}" if reason is not None else ""
    raise Failure(f"VM {vm.name!r} is {state}{why}", hint=f"`volar logs {vm.name}` shows its console" if keep else None)


def _has_run(waited: Waited) -> bool:
    """Returns whether a VM that does not run has already done its work."""
    if waited.vm is None:
        return False
    workload = waited.vm.workload
    return workload is not None and (workload.exit_code is not None or workload.signal is not None)
