"""Groups of commands that import a command's module when it is used, and accept aliases."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

ALIASES: Mapping[str, str] = {"ls": "list", "show": "get", "rm": "delete", "remove": "delete"}
"""Aliases of commands. Help and completion do not list them."""


class Lazy(NamedTuple):
    """A command that is imported or made when it is used."""

    where: str | Callable[[], click.Command]
    """The command's `module:name` in this package, or a function that makes it."""
    text: str
    """The first sentence of its help."""

    def command(self) -> click.Command:
        if not isinstance(self.where, str):
            return self.where()
        module, _, attribute = self.where.partition(":")
        found: click.Command | Lazy = getattr(importlib.import_module(f".{module}", __package__), attribute)
        return found.command() if isinstance(found, Lazy) else found


class LazyGroup(click.Group):
    """A group with commands of its own and commands that it imports when they are used. Help and completion list both
    alike."""

    def __init__(
        self, *arguments: Any, lazy: Mapping[str, Lazy] | None = None, default: str | None = None, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self.lazy = dict(lazy or {})
        self._made: dict[str, click.Command] = {}
        self.default = default
        """The command that runs if none is given: `volar images -q` means `volar images list -q`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_option = bool(args) and args[0].startswith("-") and args[0] not in ctx.help_option_names
        if self.default is not None and not ctx.resilient_parsing and (not args or is_option):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self.lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        alias = ALIASES.get(cmd_name)
        for name in (cmd_name, alias) if alias else (cmd_name,):
            if name in self.lazy and name not in self._made:
                self._made[name] = made = self.lazy[name].command()
                made.name = name
            if name in self._made:
                return self._made[name]
            if (command := super().get_command(ctx, name)) is not None:
                return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and args[0][:1] != "-" and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(f"No such command {args[0]!r}.{did_you_mean(args[0], self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.write_commands(ctx, formatter, "Commands", self.list_commands(ctx))

    def write_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter, title: str, names: Iterable[str]
    ) -> None:
        """Writes a section of the help with some of the commands."""
        listed = self._listed(ctx)
        limit = formatter.width - 6 - max(map(len, listed))
        # Sections are aligned with each other.
        spacing = 2 + max(map(len, listed))
        rows = [(name.ljust(spacing - 2), listed[name].get_short_help_str(limit)) for name in names]
        with formatter.section(title):
            formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        fitting = {name: command for name, command in self._listed(ctx).items() if name.startswith(incomplete)}
        items = [CompletionItem(name, help=command.get_short_help_str()) for name, command in fitting.items()]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def _listed(self, ctx: click.Context) -> dict[str, click.Command]:
        """Returns all commands; those whose modules are not imported yet have only a name and a text."""
        return {
            name: click.Command(name, help=self.lazy[name].text) if name in self.lazy else self.commands[name]
            for name in self.list_commands(ctx)
        }


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean …?` with the known words that are similar; nothing if none is."""
    # Only a mistake needs it.
    from difflib import get_close_matches

    similar = [repr(each) for each in get_close_matches(word, list(known), cutoff=0.55)]
    return f" Did you mean {' or '.join(similar)}?" if similar else ""
