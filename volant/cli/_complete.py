"""Names for the shell's completion, asked of the daemon while somebody waits: in little time, and failing silently."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from ._options import Options

if TYPE_CHECKING:
    from volant.client import Client

_PATIENCE_S = 1.0


def vm_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The VMs whose names begin so."""
    del parameter
    return _ask(ctx, incomplete, _vms)


def plugin_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The plugins whose names begin so."""
    del parameter
    return _ask(ctx, incomplete, _plugins)


def snapshot_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The snapshots whose names begin so."""
    del parameter
    return _ask(ctx, incomplete, _snapshots)


def network_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The networks whose names begin so."""
    del parameter
    return _ask(ctx, incomplete, _networks)


def network_choices(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """What a VM's network can be, that begins so."""
    kinds = [kind for kind in ("none", "bridge", "user") if kind.startswith(incomplete)]
    return kinds + network_names(ctx, parameter, incomplete)


def action_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The actions of the VM that is named before."""
    del parameter
    vm = str(ctx.params["vm"])

    async def actions(client: Client) -> Iterable[str]:
        return (await client.plugins.manifest((await client.vms.get(vm)).plugin)).actions

    return _ask(ctx, incomplete, actions)


def files_here_or_in_a_vm(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Paths of this host, and the VMs whose paths may follow."""
    del parameter
    here = CompletionItem(incomplete, type="file")
    return [here, *(CompletionItem(f"{name}:") for name in _ask(ctx, incomplete, _vms))]


async def _vms(client: Client) -> Iterable[str]:
    return [vm.name for vm in await client.vms.list()]


async def _snapshots(client: Client) -> Iterable[str]:
    return [snapshot.name for snapshot in await client.snapshots.list()]


async def _networks(client: Client) -> Iterable[str]:
    return [network.name for network in await client.networks.list()]


async def _plugins(client: Client) -> Iterable[str]:
    return [plugin.name for plugin in await client.plugins.list()]


def _ask(ctx: click.Context, incomplete: str, wanted: Callable[[Client], Awaitable[Iterable[str]]]) -> list[str]:
    import trio

    from ._run import client_of

    names: list[str] = []

    async def ask() -> None:
        with trio.move_on_after(_PATIENCE_S):
            async with client_of(ctx.ensure_object(Options)) as client:
                names.extend(await wanted(client))

    try:
        trio.run(ask)
    except Exception:
        # Whatever it is: the person is in the middle of a line.
        return []
    return [name for name in names if name.startswith(incomplete)]


NAMES = {"vms": vm_names, "plugins": plugin_names, "networks": network_names, "snapshots": snapshot_names}
"""What completes the name of a resource."""
