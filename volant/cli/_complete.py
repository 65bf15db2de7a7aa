"""Names for the shell's completion, asked of the daemon while somebody waits: in little time, and failing silently."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import click

from ._options import Options

if TYPE_CHECKING:
    from volant.client import Client

_PATIENCE_S = 1.0


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def vm_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The VMs whose names begin so."""
    del parameter
    return _ask(ctx, incomplete, lambda client: client.vms.list())


def plugin_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The plugins whose names begin so."""
    del parameter
    return _ask(ctx, incomplete, lambda client: client.plugins.list())


def _ask(ctx: click.Context, incomplete: str, wanted: Callable[[Client], Awaitable[Sequence[_Named]]]) -> list[str]:
    import trio

    from ._run import client_of

    names: list[str] = []

    async def ask() -> None:
        with trio.move_on_after(_PATIENCE_S):
            async with client_of(ctx.ensure_object(Options)) as client:
                names.extend(item.name for item in await wanted(client))

    try:
        trio.run(ask)
    except Exception:
        # Whatever it is: the person is in the middle of a line.
        return []
    return [name for name in names if name.startswith(incomplete)]
