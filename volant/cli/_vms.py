"""`volar vms`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Literal

import click
import trio

from volant.client import ClientError, Command, Feed, LogGap, LogLine, StreamGap, VmsOperations, Waited
from volant.concurrency import open_helpers
from volant.model import BASE, READY, CreateVm, Event, Problem, RestoreVm, Status, VmMemory, VmView

from . import _console, _copy, _exec, _forward, _snapshots
from ._complete import network_choices, plugin_names, snapshot_names, vm_names
from ._derived import add_commands
from ._events import event_line, event_options, follow, reason_lines, retrying
from ._output import Output, colourful, styled
from ._run import FAILED, TIMED_OUT, Duration, Failure, Pair, Session, States, command
from ._text import safe, span
from ._vms_group import group, name_argument

__all__ = ["group"]

# Their commands are of this group, too.
del _console, _copy, _exec, _forward, _snapshots

_WAIT_S = 120.0

wait_option = click.option("--wait", is_flag=True, help="Wait until it is done, and show events meanwhile.")
timeout_option = click.option(
    "--timeout", type=Duration(), default=_WAIT_S, show_default="2m", help="How long to wait: 500ms, 10s, 2m, …"
)


@command(group, "list")
@click.option("--status", type=click.Choice([str(state) for state in Status]), help="Only VMs in this status.")
@click.option("--label", "labels", type=Pair(), multiple=True, help="Only VMs with this label; may be repeated.")
@click.option("--plugin", shell_complete=plugin_names, help="Only VMs of this plugin.")
@click.option("--wide", is_flag=True, help="Show workloads and when VMs expire, too.")
async def list_(
    session: Session, status: str | None, labels: tuple[tuple[str, str], ...], plugin: str | None, wide: bool
) -> None:
    """List VMs."""
    vms = await session.client.vms.list(status=status or (), labels=dict(labels), plugin=plugin)
    titles: tuple[str, ...] = ("NAME", "STATUS", "PLUGIN", "CPUS", "MEMORY", "ADDRESS", "UP", "RESTARTS", "REASON")
    if wide:
        titles = (*titles, "WORKLOAD", "EXPIRES")
    rows = (
        (
            *(vm.name, str(vm.status), vm.plugin, vm.cpu_cores, f"{vm.memory_mb} MiB"),
            *(vm.ip_address, _up(vm), vm.restarts, _why(vm)),
            *((_workload(vm), _expires(vm)) if wide else ()),
        )
        for vm in vms
    )
    session.out.listing(vms, titles, rows, status_column=1)


@command(group, "get")
@name_argument
async def get(session: Session, name: str) -> None:
    """Show one VM."""
    _show(session.out, await session.client.vms.get(name))


@command(group, "memory")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=vm_names)
async def memory(session: Session, names: tuple[str, ...]) -> None:
    """Show the memory that VMs use.

    GUEST USED is what the guest itself says. What the hypervisor takes of the host's memory for it is in the other
    columns: TAKES counts what it shares with others by its part, so that the sum over VMs is what they take together;
    OWN is what nobody else has, SHARED what others have too, as clones do with their template.
    """
    found = {name: await session.client.vms.memory(name) for name in dict.fromkeys(names)}
    rows = ((name, *_memory_row(of)) for name, of in found.items())
    session.out.listing(found, ("NAME", "MEMORY", "GUEST USED", "TAKES", "OWN", "SHARED"), rows)


def _memory_row(of: VmMemory) -> tuple[str, ...]:
    guest = "unknown" if of.guest is None else f"{of.guest.total_mb - of.guest.available_mb} MiB"
    host = (of.host.pss_mb, of.host.private_mb, of.host.shared_mb)
    return (f"{of.memory_mb} MiB", guest, *(f"{figure:.0f} MiB" for figure in host))


def _booted_from(vm: VmView) -> str | None:
    if vm.booted_from is None:
        return None
    if vm.origin is not None and vm.booted_from == vm.origin.kind:
        which = "" if vm.origin.snapshot is None else f" {safe(vm.origin.snapshot)}"
        return f"{vm.booted_from}{which} of {safe(vm.origin.vm)}"
    wanted = "" if vm.boot == "auto" else f", as asked for: {vm.boot}"
    fallback = "" if vm.fallback is None else f", as a clone failed: {safe(vm.fallback.message)}"
    return f"{vm.booted_from}{wanted}{fallback}"


@command(group, "create")
@name_argument
@click.option("--cpu", "cpu_cores", type=click.IntRange(min=1), help="vCPUs.  [default: the plugin's]")
@click.option("--memory", "memory_mb", type=click.IntRange(min=64), help="Memory in MiB.  [default: the plugin's]")
@click.option(
    "--plugin", show_default="base", shell_complete=plugin_names, help="The plugin that says what the VM runs."
)
@click.option("--env", type=Pair(), multiple=True, help="KEY=VALUE for the workload; may be repeated.")
@click.option("--label", "labels", type=Pair(), multiple=True, help="KEY=VALUE; may be repeated.")
@click.option("--runtime", help="The boot image, if not the plugin's.")
@click.option("--cmdline", "kernel_cmdline", default="", help="Appended to the kernel's command line.")
@click.option(
    "--restart-policy",
    type=click.Choice(["never", "on-failure", "always"]),
    default="never",
    show_default=True,
    help="When the daemon restarts the VM.",
)
@click.option(
    "--boot",
    type=click.Choice(["auto", "cold", "template"]),
    default="auto",
    show_default=True,
    help="How to boot: auto clones a template if there is one.",
)
@click.option(
    "--from-snapshot",
    shell_complete=snapshot_names,
    help="Restore this snapshot; vCPUs, memory and plugin come from it.",
)
@click.option(
    "--network",
    shell_complete=network_choices,
    help="none, bridge, user, or a network's name.  [default: the daemon's setting]",
)
@click.option(
    "-p",
    "--publish",
    "ports",
    multiple=True,
    metavar="[HOST:]PORT:GUEST_PORT[/udp]",
    help="Publish a port of the VM on the host, on 127.0.0.1 without HOST; may be repeated.",
)
@click.option(
    "--disk-mb",
    type=click.IntRange(min=1),
    help="Size of the disk in MiB; default: that of the plugin's root filesystem.",
)
@click.option("--ttl", help="Delete the VM after this time: 30m, 2h, …")
@click.option(
    "--idempotency-key",
    metavar="WORD",
    help="Run the command again with the same word within a day, and it finds the VM it created.",
)
@wait_option
@timeout_option
async def create(
    session: Session,
    name: str,
    cpu_cores: int | None,
    memory_mb: int | None,
    plugin: str | None,
    env: tuple[tuple[str, str], ...],
    labels: tuple[tuple[str, str], ...],
    runtime: str | None,
    kernel_cmdline: str,
    restart_policy: Literal["never", "on-failure", "always"],
    boot: Literal["auto", "cold", "template"],
    from_snapshot: str | None,
    network: str | None,
    ports: tuple[str, ...],
    disk_mb: int | None,
    ttl: str | None,
    idempotency_key: str | None,
    wait: bool,
    timeout: float,
) -> int:
    """Create a VM and boot it, or restore it from a snapshot."""
    common: dict[str, Any] = {
        "name": name,
        "cpu_cores": cpu_cores,
        "memory_mb": memory_mb,
        "labels": dict(labels),
        "restart_policy": restart_policy,
        "boot": boot,
        "ttl": ttl,
    }
    request: CreateVm | RestoreVm
    if from_snapshot is not None:
        if env or runtime or kernel_cmdline:
            raise click.UsageError("--env, --runtime and --cmdline are the snapshot's, with --from-snapshot")
        if disk_mb is not None:
            raise click.UsageError("--disk-mb is the snapshot's, with --from-snapshot")
        if network or ports:
            raise click.UsageError("--network is the snapshot's, with --from-snapshot, and no ports are published")
        request = RestoreVm(from_snapshot=from_snapshot, plugin=plugin, **common)
    else:
        request = CreateVm(
            plugin=plugin or BASE.name,
            env=dict(env),
            runtime=runtime,
            kernel_cmdline=kernel_cmdline,
            network=network,
            ports=ports,
            disk_mb=disk_mb,
            **common,
        )
    if not wait:
        made = await session.client.vms.create(request, idempotency_key=idempotency_key)
        _done(session.out, made, "is created")
        _warn(session.out, made)
        return 0
    async with _telling(session, name) as teller:
        waited = await session.client.vms.create_and_wait(
            request, (READY,), timeout_s=timeout, idempotency_key=idempotency_key
        )
        await _settle(teller, waited)
    if waited.vm is not None:
        _warn(session.out, waited.vm)
    return _outcome(session.out, name, waited, READY, timeout)


def _add(change: Command, summary: str, *options: Callable[[Any], Any]) -> None:
    """Adds a command that brings VMs to a status, see `_OUTCOMES`."""

    async def run(session: Session, name: str, wait: bool, timeout: float, grace: float | None = None) -> int:
        return await _apply(session, name, change, wait, timeout, grace)

    for option in (timeout_option, wait_option, *options, name_argument):
        run = option(run)
    command(group, change, help=summary)(run)


_grace_option = click.option(
    "--grace", type=Duration(), help="Time for the guest to shut down before it is killed; default 10s."
)
_add("start", "Start a VM that is stopped or has crashed, or resume a paused one.")
_add("stop", "Stop a VM: ask its guest to shut down, then kill it.", _grace_option)
_add("restart", "Restart a VM.")
_add("pause", "Pause a VM; its memory stays. A VM that is starting is paused once it runs.")
_add("resume", "Resume a paused VM. Its clock is set.")


@command(group, "recover")
@name_argument
async def recover(session: Session, name: str) -> None:
    """Take control of a VM again that the daemon gave up on (reason: control_lost)."""
    _done(session.out, await session.client.vms.recover(name), "is under control again")


@command(group, "orphans")
async def orphans(session: Session) -> None:
    """List hypervisors that run and that no VM owns."""
    found = await session.client.system.orphans()
    rows = (
        (
            one.mark,
            one.pid,
            one.name or "",
            one.cpu_cores or "",
            f"{one.memory_mb} MiB" if one.memory_mb else "",
            one.obstacle or "",
        )
        for one in found
    )
    session.out.listing(found, ("MARK", "PID", "NAME", "CPUS", "MEMORY", "CAN'T BE ADOPTED: WHY"), rows)


@command(group, "adopt")
@click.argument("mark")
@click.option("--name", help="A name for the VM, if another VM has its own name.")
async def adopt(session: Session, mark: str, name: str | None) -> None:
    """Adopt a hypervisor that no VM owns: make it a VM.

    MARK is what `volar vms orphans` calls it.
    """
    _done(session.out, await session.client.system.adopt_orphan(mark, name=name), "is adopted")


@command(group, "kill")
@click.argument("mark")
async def kill(session: Session, mark: str) -> None:
    """Kill a hypervisor that no VM owns. Its disk stays.

    MARK is what `volar vms orphans` calls it. To end a VM, use `stop` or `delete`.
    """
    await session.client.system.kill_orphan(mark)
    if not session.out.json:
        session.out.line(f"{safe(mark)} is killed")


@command(group, "wait")
@name_argument
@click.option(
    "--for",
    "states",
    type=States(),
    default="running",
    show_default=True,
    metavar="STATES",
    help="Comma-separated: a status, ready (the workload is healthy), or deleted.",
)
@timeout_option
async def wait_for(session: Session, name: str, states: tuple[str, ...], timeout: float) -> int:
    """Wait until a VM is in one of some states."""
    wanted = list(states)
    async with _telling(session, name) as teller:
        waited = await session.client.vms.wait(name, wanted, timeout_s=timeout)
        await _settle(teller, waited)
    return _outcome(session.out, name, waited, " or ".join(wanted), timeout)


@command(group, "delete")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=vm_names)
async def delete(session: Session, names: tuple[str, ...]) -> None:
    """Delete VMs with their disks; returns when nothing of them is left."""
    for name in names:
        await session.client.vms.delete(name)
        if session.out.json:
            session.out.item({"name": name, "deleted": True})
        else:
            session.out.line(f"{safe(name)} is deleted")


@command(group, "logs")
@name_argument
@click.option("-f", "--follow", is_flag=True, help="Follow new lines.")
@click.option("--tail", type=click.IntRange(min=0), help="Start with this many lines; default 100.")
@click.option("--since", help="Start after this line number, or at this time (RFC 3339).")
@click.option(
    "--stream",
    "streams",
    type=click.Choice(["stdout", "stderr", "console"]),
    multiple=True,
    help="Only this stream; may be repeated.",
)
@click.option("-t", "--timestamps", is_flag=True, help="Put the time before each line.")
async def logs(
    session: Session,
    name: str,
    follow: bool,
    tail: int | None,
    since: str | None,
    streams: tuple[Literal["stdout", "stderr", "console"], ...],
    timestamps: bool,
) -> None:
    """Print the log of a VM: its console, and what its workload wrote."""
    if tail is not None and since is not None:
        raise click.UsageError("--tail and --since exclude each other")
    out = session.out
    async with session.client.vms.logs(
        name, tail=tail, since=since, follow=follow, streams=streams, on_retry=retrying(out.note)
    ) as feed:
        async for item in feed:
            if out.json:
                out.item(item)
            elif isinstance(item, LogGap):
                out.note(f"volar: lines {item.gap.first} to {item.gap.last} are past retention and lost")
            else:
                _print_line(out, item, timestamps)


@command(group, "devtools")
@name_argument
async def devtools(session: Session, name: str) -> None:
    """Show the endpoint for Playwright, Puppeteer and other DevTools clients of the browser in a VM.

    Waits for a VM that has just been started, and for its browser. If the daemon needs an API key, those programs
    have to send it too.
    """
    browser = await session.client.vms.browser(name)
    if session.out.json:
        session.out.document(browser)
        return
    session.out.fields(
        (("browser", browser.name), ("endpoint", browser.endpoint), ("websocket", browser.websocket))
    )  # fmt: skip
    if browser.pages:
        session.out.line("")
        rows = [(page.id, page.type, page.url, page.title) for page in browser.pages]
        session.out.table(("ID", "TYPE", "URL", "TITLE"), rows)


@command(group, "watch")
@click.argument("name", required=False, shell_complete=vm_names)
@event_options
async def watch(session: Session, /, name: str | None, **wanted: Any) -> None:
    """Print the events of all VMs, or of one, until interrupted; `volar events` has more options."""
    await follow(session, name, **wanted)


_OUTCOMES: dict[Command, tuple[str, str]] = {
    "start": ("running", "is starting"),
    "stop": ("stopped", "is stopping"),
    "restart": ("running", "is restarting"),
    "pause": ("paused", "is being paused"),
    "resume": ("running", "is being resumed"),
}
"""The status that a command leads to, and what to print of a VM that does not have it yet."""


async def _apply(
    session: Session, name: str, command: Command, wait: bool, timeout: float, grace: float | None = None
) -> int:
    state, so_far = _OUTCOMES[command]
    if not wait:
        vm = await session.client.vms.apply(name, command, grace_s=grace)
        # A restart that has just been asked for finds the VM running.
        there = vm.status == state and command != "restart"
        _done(session.out, vm, f"is {state}" if there else so_far)
        return 0
    async with _telling(session, name) as teller:
        # A VM that boots is to do its work.
        wanted = READY if command in ("start", "restart") else state
        waited = await session.client.vms.apply_and_wait(name, command, [wanted], timeout_s=timeout, grace_s=grace)
        await _settle(teller, waited)
    return _outcome(session.out, name, waited, wanted, timeout)


class _Teller:
    """Prints a VM's events."""

    def __init__(self) -> None:
        self._told: Status | None = None
        self._news = trio.Event()

    async def run(self, feed: Feed[Event | StreamGap]) -> None:
        """Until cancelled."""
        try:
            async for item in feed:
                if isinstance(item, Event):
                    sys.stderr.write(event_line(item, sys.stderr) + "\n")
                    sys.stderr.flush()
                    self._told = item.status
                    self._news.set()
                    self._news = trio.Event()
        except (ClientError, Problem):
            # It was an extra; the command itself will say what is wrong.
            return

    async def told(self, status: Status) -> None:
        """Return once the event of `status` is printed: it and the answer to our wait race each other."""
        with trio.move_on_after(1):
            while self._told != status:
                await self._news.wait()


@asynccontextmanager
async def _telling(session: Session, name: str) -> AsyncIterator[_Teller | None]:
    """Print the VM's events while the block runs; None when nobody wants them."""
    if session.out.json:
        yield None
        return
    teller = _Teller()
    async with session.client.events(vm=name) as feed, open_helpers() as helpers:
        helpers.start_soon(teller.run, feed)
        yield teller


async def _settle(teller: _Teller | None, waited: Waited) -> None:
    if teller is not None and waited.vm is not None and waited.outcome != "timeout":
        await teller.told(waited.vm.status)


def _print_line(out: Output, item: LogLine, timestamps: bool) -> None:
    terminal = sys.stdout.isatty()
    text = safe(item.line) if terminal else item.line
    if item.stream == "stderr" and colourful(sys.stdout):
        text = styled(text, "red", sys.stdout)
    if timestamps:
        moment = item.timestamp.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        text = f"{moment}  {text}"
    out.line(text)


def _outcome(out: Output, name: str, waited: Waited, wanted: str, timeout_s: float) -> int:
    vm = waited.vm
    if waited.outcome == "met":
        if vm is None:
            out.document(None) if out.json else out.line(f"{safe(name)} is {safe(wanted)}")
        else:
            _done(out, vm, f"is {out.status(str(vm.status))}" if "deleted" not in wanted else "is deleted")
        return 0
    if out.json:
        out.document(vm)
        return TIMED_OUT if waited.outcome == "timeout" else FAILED
    if waited.outcome == "timeout":
        now = f", it is {vm.status}" if vm is not None else ""
        if vm is not None and vm.workload is not None and vm.status is Status.RUNNING:
            now = f"{now}, and its workload is {_workload(vm)}"
        raise Failure(
            f"VM {name!r} is not {wanted} after {timeout_s:g} s{now}",
            code=TIMED_OUT,
            hint=f"it goes on without us: `volar vms wait {name}` waits further, `volar vms logs {name}` shows why",
        )
    state = f"is {vm.status}" if vm is not None else "is deleted"
    why = f": {vm.reason.message}" if vm is not None and vm.reason is not None else ""
    if vm is not None and vm.workload is not None and vm.workload.state == "failed":
        why = f", and its workload has failed: {safe(vm.workload.error or '')}"
    raise Failure(
        f"VM {name!r} {state}{why}",
        hint=f"`volar vms logs {name}` shows its console, `volar vms get {name}` the last lines of it",
    )


def _warn(out: Output, vm: VmView) -> None:
    """Print what the daemon warns of to standard error; with --json it stands in the document."""
    if not out.json:
        for warning in vm.warnings:
            out.note(f"volar: warning: {safe(warning)}")


def _done(out: Output, vm: VmView, what: str) -> None:
    out.result(vm, f"{safe(vm.name)} {what}")


def _show(out: Output, vm: VmView) -> None:
    if out.json:
        out.document(vm)
        return
    out.fields(
        [
            ("name", vm.name),
            ("id", vm.id),
            ("status", str(vm.status)),
            ("desired", str(vm.desired)),
            ("plugin", vm.plugin),
            ("runtime", vm.runtime),
            ("vCPUs", vm.cpu_cores),
            ("memory", f"{vm.memory_mb} MiB"),
            ("up", _up(vm)),
            ("workload", _workload(vm)),
            ("pid", vm.pid),
            ("hypervisor", vm.hypervisor and f"{vm.hypervisor} ({vm.accelerator})"),
            ("network", f"{safe(vm.network)} ({safe(vm.network_reason)})"),
            ("address", vm.ip_address),
            ("ports", ", ".join(map(safe, vm.ports))),
            ("restart policy", vm.restart_policy),
            ("restarts", vm.restarts),
            ("boots", vm.boots),
            ("booted from", _booted_from(vm)),
            ("labels", vm.labels),
            ("kernel cmdline", vm.kernel_cmdline),
            ("created", vm.created_at),
            ("started", vm.started_at),
            ("expires", vm.expires_at),
        ]
    )
    if vm.reason is not None:
        out.line("reason:")
        out.line(reason_lines(vm.reason))


def _up(vm: VmView) -> str:
    if vm.started_at is None or vm.status not in (Status.RUNNING, Status.PAUSED):
        return ""
    return span((datetime.now(UTC) - vm.started_at).total_seconds())


def _workload(vm: VmView) -> str:
    if vm.workload is None:
        return ""
    return f"{vm.workload.state}: {safe(vm.workload.error)}" if vm.workload.error else vm.workload.state


def _expires(vm: VmView) -> str:
    return "" if vm.expires_at is None else vm.expires_at.strftime("%Y-%m-%d %H:%M:%SZ")


def _why(vm: VmView) -> str:
    if vm.reason is None and vm.workload is not None and vm.workload.state in ("failed", "unhealthy"):
        return f"workload_{vm.workload.state}"
    return vm.reason.code if vm.reason is not None else ""


add_commands(group, "vms", VmsOperations)
