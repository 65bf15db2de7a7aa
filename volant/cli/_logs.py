"""`volar vms logs`."""

from __future__ import annotations

import sys
from datetime import UTC
from typing import Literal

import click

from volant.model import LogGap, LogLine

from ._events import retrying
from ._output import Output, colourful, styled
from ._streaming import Session, command
from ._text import safe
from ._vms_group import name_argument


@command(None, "logs")
@name_argument
@click.option("-f", "--follow", is_flag=True, help="Follow new lines.")
@click.option("--tail", type=click.IntRange(min=0), help="Start with this many lines; default 100.")
@click.option("--since", help="Start after this line number, or at this time (RFC 3339).")
@click.option(
    "--stream",
    "streams",
    type=click.Choice(["stdout", "stderr", "console"]),
    multiple=True,
    help="Only this stream; may be repeated.",
)
@click.option("-t", "--timestamps", is_flag=True, help="Put the time before each line.")
async def logs(
    session: Session,
    name: str,
    follow: bool,
    tail: int | None,
    since: str | None,
    streams: tuple[Literal["stdout", "stderr", "console"], ...],
    timestamps: bool,
) -> None:
    """Print the log of a VM's console and workload."""
    if tail is not None and since is not None:
        raise click.UsageError("--tail and --since exclude each other")
    out = session.out
    async with session.client.vms.logs(
        name, tail=tail, since=since, follow=follow, streams=streams, on_retry=retrying(out.note)
    ) as feed:
        async for item in feed:
            if out.json:
                out.item(item)
            elif isinstance(item, LogGap):
                out.note(f"volar: lines {item.gap.first} to {item.gap.last} are not kept any more")
            else:
                _print_line(out, item, timestamps)


def _print_line(out: Output, item: LogLine, timestamps: bool) -> None:
    terminal = sys.stdout.isatty()
    text = safe(item.line) if terminal else item.line
    if item.stream == "stderr" and colourful(sys.stdout):
        text = styled(text, "red", sys.stdout)
    if timestamps:
        moment = item.timestamp.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        text = f"{moment}  {text}"
    out.line(text)
