"""`volar vms`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from volant.client import Command, VmsOperations, Waited
from volant.model import READY, Status, VmMemory

from ._complete import plugin_names, vm_names
from ._derived import add_commands
from ._options import listing
from ._run import Duration, Pair, Session, command
from ._text import safe
from ._vm_output import done, expires, show, status_of, up, why, workload
from ._vms_group import group, name_argument, timeout_option, wait_for_outcome, wait_option

if TYPE_CHECKING:
    from volant.client import Client

__all__ = ["group"]


@command(group, "list")
@listing
@click.option("--status", type=click.Choice([str(state) for state in Status]), help="Only VMs in this status.")
@click.option("--label", "labels", type=Pair(), multiple=True, help="Only VMs with this label; may be repeated.")
@click.option("--plugin", shell_complete=plugin_names, help="Only VMs of this plugin.")
@click.option("--wide", is_flag=True, help="Also show workloads and expiry.")
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
            *(vm.name, status_of(vm), vm.plugin, vm.cpu_cores, f"{vm.memory_mb} MiB"),
            *(vm.ip_address, up(vm), vm.restarts, why(vm)),
            *((workload(vm), expires(vm)) if wide else ()),
        )
        for vm in vms
    )
    session.out.listing(vms, titles, rows, status_column=1)


@command(group, "get")
@name_argument
async def get(session: Session, name: str) -> None:
    """Show one VM."""
    show(session.out, await session.client.vms.get(name))


@command(group, "memory")
@listing
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=vm_names)
async def memory(session: Session, names: tuple[str, ...]) -> None:
    """Show the memory that VMs use.

    GUEST USED is the guest's own figure. The other columns are memory of the host: OWN belongs only to this VM, SHARED
    is shared with others, as clones share their template, and TAKES is OWN plus the VM's part of SHARED, so the sum of
    TAKES is the use of all VMs together.
    """
    found = {name: await session.client.vms.memory(name) for name in dict.fromkeys(names)}
    rows = ((name, *_memory_row(of)) for name, of in found.items())
    session.out.listing(found, ("NAME", "MEMORY", "GUEST USED", "TAKES", "OWN", "SHARED"), rows)


def _memory_row(of: VmMemory) -> tuple[str, ...]:
    guest = "unknown" if of.guest is None else f"{of.guest.total_mb - of.guest.available_mb} MiB"
    host = (of.host.pss_mb, of.host.private_mb, of.host.shared_mb)
    return (f"{of.memory_mb} MiB", guest, *(f"{figure:.0f} MiB" for figure in host))


def _add(change: Command, summary: str, *options: Callable[[Any], Any]) -> None:
    """Adds a command that changes VMs to a status, see `_OUTCOMES`."""

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


@command(group, "orphans")
@listing
async def orphans(session: Session) -> None:
    """List orphaned hypervisors: running hypervisors that no VM owns."""
    found = await session.client.system.orphans()
    rows = (
        (
            one.tag,
            one.pid,
            one.name or "",
            one.cpu_cores or "",
            f"{one.memory_mb} MiB" if one.memory_mb else "",
            one.obstacle or "",
        )
        for one in found
    )
    session.out.listing(found, ("TAG", "PID", "NAME", "CPUS", "MEMORY", "CAN'T BE ADOPTED: WHY"), rows)


@command(group, "adopt")
@click.argument("tag")
@click.option("--name", help="A name for the VM, if its own name is in use.")
async def adopt(session: Session, tag: str, name: str | None) -> None:
    """Adopt an orphaned hypervisor: make it a VM again.

    TAG is its process tag, which `volar vms orphans` shows.
    """
    done(session.out, await session.client.system.adopt_orphan(tag, name=name), "is adopted")


@command(group, "kill")
@click.argument("tag")
async def kill(session: Session, tag: str) -> None:
    """Kill an orphaned hypervisor. Its disk stays.

    TAG is its process tag, which `volar vms orphans` shows. To end a VM, use `stop` or `delete`.
    """
    await session.client.system.kill_orphan(tag)
    if not session.out.json:
        session.out.line(f"{safe(tag)} is killed")


@command(group, "delete")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=vm_names)
async def delete(session: Session, names: tuple[str, ...]) -> None:
    """Delete VMs with their disks; returns when they are completely removed."""
    for name in names:
        await session.client.vms.delete(name)
        if session.out.json:
            session.out.item({"name": name, "deleted": True})
        else:
            session.out.line(f"{safe(name)} is deleted")


@command(group, "devtools")
@name_argument
async def devtools(session: Session, name: str) -> None:
    """Show the endpoint for Playwright, Puppeteer and other DevTools clients of the browser in a VM.

    Waits for a VM that has just been started, and for its browser. If the daemon requires an API key, these clients
    must send it too.
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


_OUTCOMES: dict[Command, tuple[str, str]] = {
    "start": ("running", "is starting"),
    "stop": ("stopped", "is stopping"),
    "restart": ("running", "is restarting"),
    "pause": ("paused", "is being paused"),
    "resume": ("running", "is being resumed"),
}
"""The status that a command leads to, and the text for a VM that does not have it yet."""


async def _apply(
    session: Session, name: str, command: Command, wait: bool, timeout: float, grace: float | None = None
) -> int:
    state, so_far = _OUTCOMES[command]
    if wait:
        # A VM that boots is to do its work.
        wanted = READY if command in ("start", "restart") else state

        async def apply_and_wait(client: Client) -> Waited:
            return await client.vms.apply_and_wait(name, command, [wanted], timeout_s=timeout, grace_s=grace)

        return wait_for_outcome(session, name, apply_and_wait, wanted, timeout)
    vm = await session.client.vms.apply(name, command, grace_s=grace)
    # Right after a restart the VM is still running, from before.
    there = vm.status == state and command != "restart"
    done(session.out, vm, f"is {state}" if there else so_far)
    return 0


add_commands(group, "vms", VmsOperations, besides=["stats"])
