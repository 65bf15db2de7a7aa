"""Commands of `volar` itself with Docker's names: `ps`, `start`, `stop`, `restart`, `rm`, `inspect`.

`volar vms` has the complete forms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from volant.client import Command
from volant.model import Problem, Status, VmView

from ._complete import vm_names
from ._options import listing
from ._run import Duration, Failure, Session, command
from ._text import safe
from ._vm_output import status_of, up, why

if TYPE_CHECKING:
    from volant.client._requests import Requests

    from ._streaming import Session as Streaming

_ENDED = frozenset({Status.STOPPED, Status.CRASHED})
_ACTIVE = tuple(state for state in Status if state not in _ENDED)
_STATES = [str(state) for state in Status]
_FILTERS = ("label", "name", "plugin", "status")

names_argument = click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=vm_names)
_timeout_option = click.option(
    "--timeout", type=Duration(), default=120.0, show_default="2m", help="Maximum wait for each VM: 10s, 2m, …"
)


class _Filter(click.ParamType[tuple[str, str]]):
    """A filter such as `label=KEY=VALUE`, `status=running`, `name=web` or `plugin=base`."""

    name = "filter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or key not in _FILTERS:
            self.fail(f"{value!r} is no filter; use {', '.join(f'{key}=…' for key in _FILTERS)}", param, ctx)
        if key == "label" and "=" not in text:
            self.fail(f"{value!r} is not label=KEY=VALUE", param, ctx)
        if key == "status" and text not in _STATES:
            self.fail(f"{text!r} is no status; use {', '.join(_STATES)}", param, ctx)
        return key, text


@command(None, "ps")
@click.option("-a", "--all", "every", is_flag=True, help="Also stopped and crashed VMs.")
@click.option(
    "-f",
    "--filter",
    "filters",
    type=_Filter(),
    multiple=True,
    metavar="KEY=VALUE",
    help="Only VMs with this label=KEY=VALUE, status, plugin, or this text in their name; may be repeated.",
)
@listing
async def ps(session: Session, every: bool, filters: tuple[tuple[str, str], ...]) -> None:
    """List running VMs; `volar vms list` has more columns."""
    wanted: dict[str, list[str]] = {key: [text for other, text in filters if other == key] for key in _FILTERS}
    # Whoever names a status means VMs in it, whether they run or not.
    status = wanted["status"] or (() if every else _ACTIVE)
    labels = dict(text.split("=", 1) for text in wanted["label"])
    found = await session.client.vms.list(status=status, labels=labels, plugin=wanted["plugin"])
    vms = [vm for vm in found if all(text in vm.name for text in wanted["name"])]
    rows = ((vm.name, _image(vm), status_of(vm), up(vm), vm.ip_address, " ".join(vm.ports), why(vm)) for vm in vms)
    titles = ("NAME", "IMAGE", "STATUS", "UP", "ADDRESS", "PORTS", "REASON")
    session.out.listing(vms, titles, rows, status_column=2)


def _image(vm: VmView) -> str:
    """Returns the image or plugin of a VM."""
    return vm.plugin if vm.image is None else vm.image.reference


@command(None, "inspect")
@names_argument
async def inspect(session: Session, names: tuple[str, ...]) -> None:
    """Print all properties of VMs, as JSON."""
    session.out.document([await session.client.vms.get(name) for name in names])


def _changing(word: Command, state: Status, summary: str, *options: Callable[[Any], Any]) -> click.Command:
    """Returns a command that changes VMs to a status, one after the other, and prints their names."""

    async def run(session: Session, names: tuple[str, ...], timeout: float, grace: float | None = None) -> int:
        async def each(streaming: Streaming) -> None:
            for name in names:
                waited = await streaming.client.vms.apply_and_wait(
                    name, word, [state], timeout_s=timeout, grace_s=grace
                )
                if waited.outcome != "met":
                    now = "deleted" if waited.vm is None else str(waited.vm.status)
                    because = f": {waited.vm.reason.message}" if waited.vm and waited.vm.reason else ""
                    raise Failure(
                        f"VM {name!r} is {now}, not {state}{because}", hint=f"`volar logs {name}` shows its log"
                    )
                _print_name(session, name, waited.vm)

        return session.stream(each) or 0

    for option in (_timeout_option, *options, names_argument):
        run = option(run)
    return command(None, word, help=summary)(run)


class _Seconds(Duration):
    """A duration, or a plain number of seconds, as in Docker."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return super().convert(f"{value}s" if str(value).isdecimal() else value, param, ctx)


_grace_option = click.option(
    "-t", "--time", "--grace", "grace", type=_Seconds(), help="Time for the guest before it is killed; default 10s."
)
start = _changing("start", Status.RUNNING, "Start VMs, and wait until they run.")
stop = _changing("stop", Status.STOPPED, "Stop VMs, and wait until they are stopped.", _grace_option)
restart = _changing("restart", Status.RUNNING, "Restart VMs, and wait until they run.", _grace_option)


@command(None, "rm")
@click.option("-f", "--force", is_flag=True, help="Also delete running VMs, and ignore names that do not exist.")
@names_argument
async def rm(session: Session, names: tuple[str, ...], force: bool) -> None:
    """Delete VMs with their disks; running VMs only with -f."""
    for name in names:
        await delete_one(session.client, name, force=force)
        _print_name(session, name, None)


async def delete_one(client: Requests, name: str, *, force: bool) -> None:
    """Deletes a VM. :raises Failure: it is running, and `force` is not given."""
    try:
        if not force:
            vm = await client.vms.get(name)
            if vm.status not in _ENDED:
                raise Failure(f"VM {name!r} is {vm.status}", hint=f"stop it first, or use `volar rm -f {name}`")
        await client.vms.delete(name)
    except Problem as problem:
        if not (force and problem.status == 404):
            raise


def _print_name(session: Session, name: str, vm: VmView | None) -> None:
    if session.out.json:
        session.out.item(vm if vm is not None else {"name": name, "deleted": True})
    else:
        session.out.line(safe(name))
