"""`volar run`: a VM from an OCI image, which runs one program like a command on this host, or in the background.

In the foreground the VM starts without its program. Volar runs it as a command, so that input, terminal, signals and
exit code pass as those of `volar exec` do, and stops or deletes the VM however that ends.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import click
import msgspec
import trio

from volant.client import ClientError, ConnectionLost, ExecSession, Waited
from volant.concurrency import open_helpers
from volant.model import CreateVm, Egress, Failover, Problem, PullImage, Replicate, Status, VmView

from ._complete import network_choices
from ._exec import exit_code, need_terminal, pass_on, terminal_size
from ._guest import once_running
from ._image_options import image_members, image_options, registry_options
from ._names import generated_name
from ._options import egress_option, volume_option
from ._pulls import showing_pull
from ._registry_auth import registry_auth
from ._replicate import replicate_option
from ._run import NOT_RUN, Failure, Pair, Passing
from ._sizes import Size
from ._stock_offer import stock_instead
from ._streaming import Session, command
from ._terminal import raw
from ._text import safe
from ._variables import env_file_option, env_option, env_secret_option, secret_option, variables, with_secrets
from ._vm_output import reason_lines, warn

_START_S = 3600.0
"""How long to wait for a VM. Its image has half an hour of this, and the limits of the daemon end it earlier."""
_CLEAN_S = 75.0
"""How long the daemon may take to delete a VM."""
_GRACE_S = 10.0
"""How long the program may go on after SIGTERM or SIGHUP, as Docker's default for `docker stop`."""
_INTERRUPTS = 3
"""The third Ctrl-C ends a program that ignores it, as with Docker."""
_NAMES = 8
"""Attempts at a generated name that is not taken."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
_RESTARTS: dict[str, Literal["never", "on-failure", "always"]] = {
    "no": "never",
    "on-failure": "on-failure",
    "always": "always",
    "unless-stopped": "always",
}


class _Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asks for, beside the VM itself."""

    request: CreateVm
    image: str
    named: bool
    """Whether the user has given the name."""
    env: dict[str, str]
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
@click.option("--rm", "remove", is_flag=True, help="Delete the VM when the program has ended, or volar is interrupted.")
@click.option("-d", "--detach", is_flag=True, help="Print the VM's name once it runs, and leave it running.")
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
@click.option("--disk", "disk_mb", type=Size(), metavar="SIZE", help="Most that the VM may write.  [default: 10G]")
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
    help="With -d: when its host of a fleet dies, another one boots it (restart) or continues it (restore).",
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

    Without -d volar passes output, signals and the exit code on, and input with -i; use -it for a shell. Then the VM
    is stopped, and with --rm deleted. `volar ps -a` shows VMs that are stopped.

    The exit code is the program's, 128 + n if signal n ended it, 126 or 127 if it can't be executed or does not exist,
    125 if volar or the daemon failed.
    """
    if detach and remove:
        raise click.UsageError(
            "--rm does not work with -d: nobody would delete the VM when its program has ended; use `volar rm` then"
        )
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
        start_workload=detach,
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
        request=request, image=image, named=name is not None, env=environ, auth=auth, pull=pull,
        interactive=interactive, tty=tty, remove=remove,
    )  # fmt: skip
    if detach:
        return await _detached(session, wanted)
    return await _Foreground(session, wanted).run()


async def _detached(session: Session, wanted: _Wanted) -> int:
    await _prepare(session, wanted)
    vm = await _create(session, wanted)
    try:
        vm = await _until_running(session, vm, wanted.image)
    except trio.Cancelled:
        session.out.note(f"volar: VM {vm.name} goes on starting; `volar rm -f {vm.name}` deletes it")
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
        self._scope = trio.CancelScope()
        self._ended_by: int | None = None
        self._interrupts = 0

    async def run(self) -> int:
        """Returns the exit code."""
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
        vm = await _until_running(session, vm, wanted.image, keep=not wanted.remove)
        if vm.image is None or not vm.image.command:
            raise Failure("the image names no program; give a command after its name")
        command = vm.image.command
        return await once_running(session, vm.name, lambda: self._execute(vm.name, command))

    async def _execute(self, name: str, program: tuple[str, ...]) -> int:
        wanted, environ = self._wanted, dict(self._wanted.env)
        if wanted.tty and os.environ.get("TERM"):
            environ.setdefault("TERM", os.environ["TERM"])
        rows, cols = terminal_size() or (24, 80)
        async with self._session.client.vms.exec_session(
            name, program, tty=wanted.tty, rows=rows, cols=cols, env=environ
        ) as process:
            if not wanted.interactive and not wanted.tty:
                await process.send_eof()
            terminal = wanted.tty and wanted.interactive
            self._process = process
            try:
                with raw(sys.stdin.fileno()) if terminal else nullcontext():
                    await pass_on(self._session, process, wanted.interactive, terminal, endings=False)
            finally:
                self._process = None
            assert process.end is not None
            return exit_code(self._session, process.end)

    async def _watch_signals(
        self, helpers: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Passes signals on to the program. Before it runs, and when it does not end, they end everything."""
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
        """Stops or deletes the VM. Errors are reported, and change nothing else."""
        vm = self._vm
        if vm is None:
            return
        remove = self._wanted.remove
        vms = self._session.client.vms
        try:
            with trio.fail_after(_CLEAN_S):
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


async def _prepare(session: Session, wanted: _Wanted) -> None:
    """Does what `--pull` says. :raises Failure: `--pull never`, and the image is not in the cache."""
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
    """Creates the VM, under another name if the one that was generated is taken, or of a stock image if no registry can
    be reached and the user wants that. Nothing cancels it between the daemon's answer and its return."""
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


async def _until_running(session: Session, vm: VmView, image: str, keep: bool = True) -> VmView:
    """Waits until a VM runs, and shows the fetch of its image meanwhile.

    :param image: its reference, as the user has written it
    :param keep: whether the VM is there afterwards, so that its log can be read
    :raises Failure: it does not run
    """
    digest = None if vm.image is None else vm.image.digest
    async with showing_pull(session.client, session.out, image, digest):
        waited: Waited = await session.client.vms.wait(vm.name, (Status.RUNNING,), timeout_s=_START_S)
    if waited.outcome == "met" and waited.vm is not None:
        return waited.vm
    if waited.outcome == "timeout":
        raise Failure(f"VM {vm.name!r} does not run after {_START_S:g} s")
    state = "deleted" if waited.vm is None else str(waited.vm.status)
    reason = None if waited.vm is None else waited.vm.reason
    if not keep and reason is not None and not session.out.json:
        session.out.note(reason_lines(reason))
    why = f": {reason.message}" if reason is not None else ""
    raise Failure(f"VM {vm.name!r} is {state}{why}", hint=f"`volar logs {vm.name}` shows its console" if keep else None)
