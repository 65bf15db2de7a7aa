"""`volar completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


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
