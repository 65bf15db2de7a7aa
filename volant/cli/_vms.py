"""`volar vms`."""

from __future__ import annotations

from collections.abc import Callable

import click

from volant.client import SystemOperations, VmsOperations
from volant.model import OrphanView, Status, VmMemory, VmView

from ._complete import plugin_names, vm_names
from ._derived import Shown, add_commands, derived
from ._options import listing
from ._run import Session, command
from ._shown import Sheet
from ._text import safe
from ._vm_output import expires, show, status_of, up, why, workload
from ._vms_group import group, name_argument

__all__ = ["group"]


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


def _outcome(status: str, so_far: str) -> Callable[[VmView], str]:
    """Returns the function that says what a command has done so far, for the status that it leads to."""
    return lambda vm: f"{safe(vm.name)} is {status if vm.status == status else so_far}"


_SHOWN = Shown(
    {
        VmView: show,
        OrphanView: Sheet(("tag", "pid", "name", "cpu_cores", "memory_mb", "obstacle")),
    },
    {
        "start": _outcome("running", "starting"),
        "stop": _outcome("stopped", "stopping"),
        # Right after it, the VM is still running, from before.
        "restart": lambda vm: f"{safe(vm.name)} is restarting",
        "pause": _outcome("paused", "being paused"),
        "resume": _outcome("running", "being resumed"),
        "recover": "{name} is {status}",
        "adopt_orphan": "{name} is adopted",
        "kill_orphan": "{tag} is killed",
    },
)
_LIST = Sheet(
    ("name", "status", "plugin", "cpu_cores", "memory_mb", "ip_address", "up", "restarts", "reason"),
    wide=("workload", "expires"),
    cells={"status": status_of, "up": up, "reason": why, "workload": workload, "expires": expires},
)
_FILTERS = {
    "status": click.option(
        "--status", multiple=True, type=click.Choice([str(state) for state in Status]), help="Only VMs in this status."
    ),
    "plugin": click.option("--plugin", multiple=True, shell_complete=plugin_names, help="Only VMs of this plugin."),
}
group.lazy |= {
    "list": derived("vms", VmsOperations, "list", Shown({VmView: _LIST}), **_FILTERS),
    "orphans": derived("system", SystemOperations, "orphans", _SHOWN),
    "adopt": derived("system", SystemOperations, "adopt_orphan", _SHOWN),
    "kill": derived("system", SystemOperations, "kill_orphan", _SHOWN),
}
add_commands(group, "vms", VmsOperations, _SHOWN, besides=["stats"])
