"""Groups of commands that import the module of a command when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem


class Lazy(NamedTuple):
    """A command whose module is not imported yet."""

    where: str
    """`module:name` in this package."""
    text: str
    """The first sentence of its help."""


class LazyGroup(click.Group):
    """Has commands of its own, and some that it imports when they are used. Help and completion list both alike."""

    def __init__(self, *arguments: Any, lazy: Mapping[str, Lazy], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self.lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.lazy:
            module, _, name = self.lazy[cmd_name].where.partition(":")
            found: click.Command = getattr(importlib.import_module(f".{module}", __package__), name)
            return found
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed = self._listed(ctx)
        limit = formatter.width - 6 - max(map(len, listed))
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit)) for name, command in listed.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        fitting = {name: command for name, command in self._listed(ctx).items() if name.startswith(incomplete)}
        items = [CompletionItem(name, help=command.get_short_help_str()) for name, command in fitting.items()]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def _listed(self, ctx: click.Context) -> dict[str, click.Command]:
        """Returns all commands; those whose modules are not imported have only a name and a text."""
        return {
            name: click.Command(name, help=self.lazy[name].text) if name in self.lazy else self.commands[name]
            for name in self.list_commands(ctx)
        }
