"""The option `--replicate`: how often a VM is copied to other hosts, as `EVERY[:HOSTS]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from volant.model import MAX_REPLICAS, Replicate

F = TypeVar("F", bound=Callable[..., Any])


class _Text(click.ParamType[Replicate]):
    """`5m`, or `5m:2` for two hosts. The daemon knows what a duration is."""

    name = "every[:hosts]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Replicate:
        if isinstance(value, Replicate):
            return value
        every, colon, hosts = str(value).partition(":")
        if colon and not (hosts.isascii() and hosts.isdecimal() and 1 <= int(hosts) <= MAX_REPLICAS):
            self.fail(f"{hosts!r} is no number of hosts from 1 to {MAX_REPLICAS}; write it like 5m or 5m:2", param, ctx)
        return Replicate(every=every, to=int(hosts) if colon else 1)


def replicate_option(function: F) -> F:
    """Gives a command the option `--replicate`, as the parameter `replicate`."""
    return click.option(
        "--replicate",
        type=_Text(),
        metavar="EVERY[:HOSTS]",
        help="For --failover restore: copy it every 5m, say, to another host; 5m:2 for two hosts.",
    )(function)
