"""Commands that stream, wait or follow: on Trio, with the whole client."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

import click
import trio

from volant.client import Client

from ._options import Options
from ._output import Output
from ._run import Work, asked_for, made

P = ParamSpec("P")


@dataclass(frozen=True)
class Session:
    """The whole client and the output of a command."""

    client: Client
    out: Output


def command(
    group: click.Group | None, name: str, **attributes: Any
) -> Callable[[Callable[Concatenate[Session, P], Coroutine[Any, Any, int | None]]], click.Command]:
    """Makes an async function a command of `group`, if one is given; it may return an exit code."""
    return made(run, group, name, attributes)


def run(options: Options, work: Work[Session]) -> int | None:
    """Runs `work` with a client of its own, and returns its exit code."""

    async def connected() -> int | None:
        async with client_of(options) as client:
            return await work(Session(client, Output(options.json, options.names)))

    if not sys.warnoptions:
        # An interrupt may come after the call of a coroutine function and before its await.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    return trio.run(connected)


def client_of(options: Options) -> Client:
    """Returns the client for the options. :raises click.UsageError: the address or the key is malformed."""
    return asked_for(options, Client)
