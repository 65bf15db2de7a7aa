"""`volar completion`, and completion of names in a shell. Names are requested from the daemon with a short deadline;
errors are silent.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from ._options import Options


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def group(shell: str) -> None:
    """Print the completion script for a shell.

    It completes commands, options, and names of VMs and plugins.

    \b
    bash: echo 'eval "$(volar completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(volar completion zsh)"' >> ~/.zshrc
    fish: volar completion fish > ~/.config/fish/completions/volar.fish

    Names come from the daemon of VOLANT_API_BASE or --api, if it answers within a second.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "volar", "_VOLAR_COMPLETE").source())


if TYPE_CHECKING:
    from volant.client._requests import Requests

_PATIENCE_S = 1.0


Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def _names(resource: str) -> Complete:
    """Returns the function that completes names of a resource."""

    async def listed(client: Requests) -> Iterable[str]:
        return [each.name for each in await getattr(client, resource).list()]

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        del parameter
        return _ask(ctx, incomplete, listed)

    return complete


_RESOURCES = ("vms", "plugins", "networks", "snapshots", "volumes", "projects", "keys", "secrets")
NAMES = {resource: _names(resource) for resource in _RESOURCES}
"""The function that completes names of a resource."""
(
    vm_names,
    plugin_names,
    network_names,
    snapshot_names,
    volume_names,
    project_names,
    key_names,
    secret_names,
) = NAMES.values()


def network_choices(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Returns the values of `--network` that begin with `incomplete`."""
    kinds = [kind for kind in ("none", "bridge", "user") if kind.startswith(incomplete)]
    return kinds + network_names(ctx, parameter, incomplete)


def action_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Returns the actions of the VM in the preceding argument."""
    del parameter
    vm = str(ctx.params["vm"])

    async def actions(client: Requests) -> Iterable[str]:
        return (await client.plugins.manifest((await client.vms.get(vm)).plugin)).actions

    return _ask(ctx, incomplete, actions)


def files_here_or_in_a_vm(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Returns paths of this host, and `NAME:` for each VM."""
    here = CompletionItem(incomplete, type="file")
    return [here, *(CompletionItem(f"{name}:") for name in vm_names(ctx, parameter, incomplete))]


def _ask(
    ctx: click.Context, incomplete: str, wanted: Callable[[Requests], Coroutine[Any, Any, Iterable[str]]]
) -> list[str]:
    from volant.client._plain import run_plain

    from ._run import plain_client_of

    try:
        names = run_plain(wanted(plain_client_of(ctx.ensure_object(Options), within_s=_PATIENCE_S)))
    except Exception:
        # Any error: a message would disturb the line that the user is typing.
        return []
    return [name for name in names if name.startswith(incomplete)]
