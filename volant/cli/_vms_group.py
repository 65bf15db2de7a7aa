"""The group of commands `volar vms`, with the modules of commands that are imported when they are used."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

from ._complete import vm_names
from ._lazy_group import Lazy, LazyGroup
from ._run import Duration, Session

if TYPE_CHECKING:
    from volant.client import Client, Waited

name_argument = click.argument("name", shell_complete=vm_names)
timeout_option = click.option(
    "--timeout", type=Duration(), default=120.0, show_default="2m", help="Maximum wait: 500ms, 10s, 2m, …"
)
wait_option = click.option("--wait", is_flag=True, help="Wait until it is complete, and show events meanwhile.")


def wait_for_outcome(
    session: Session, name: str, ask: Callable[[Client], Coroutine[Any, Any, Waited]], wanted: str, timeout_s: float
) -> int:
    """Starts an operation and waits for its outcome like `volar vms wait`. Returns the exit code."""
    from ._waiting import wait_and_show

    return session.stream(lambda streaming: wait_and_show(streaming, name, ask, wanted, timeout_s)) or 0


_LAZY = {
    "console": Lazy("_console:console", "Connect to the serial console of a VM; Ctrl-] disconnects."),
    "create": Lazy("_create:create", "Create a VM and boot it, or restore it from a snapshot."),
    "cp": Lazy("_copy:copy", "Copy files and directories between this host and a VM."),
    "exec": Lazy("_exec:exec_", "Run a command in a VM; put options before NAME."),
    "fork": Lazy("_snapshots:fork", "Fork a running VM: create copies that continue from its current state."),
    "forward": Lazy("_forward:forward", "Forward local ports to ports of a VM, until interrupted."),
    "logs": Lazy("_logs:logs", "Print the log of a VM's console and workload."),
    "sessions": Lazy(
        "_sessions:sessions", "List the detached commands in a VM; an ended one is listed for ten minutes."
    ),
    "snapshot": Lazy("_snapshots:take", "Save a VM's present memory, devices and disk."),
    "top": Lazy("_top:top", "Show the resource use of VMs, until interrupted."),
    "wait": Lazy("_waiting:wait_for", "Wait until a VM reaches one of some states."),
    "watch": Lazy(
        "_events:watch", "Print the events of all VMs, or of one, until interrupted; `volar events` has more options."
    ),
}


@click.group(name="vms", cls=LazyGroup, lazy=_LAZY)
def group() -> None:
    """Create, watch and use VMs: all commands for them."""
