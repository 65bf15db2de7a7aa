"""`volar vms sessions`: the detached commands in a VM."""

from __future__ import annotations

import click

from volant.client import ExecEnd

from ._options import listing
from ._run import Session, command
from ._text import safe, span
from ._vms_group import name_argument


@command(None, "sessions")
@listing
@name_argument
@click.option("--end", metavar="ID", help="Kill this command and remove it from the list.")
async def sessions(session: Session, name: str, end: str | None) -> None:
    """List the detached commands in a VM; an ended one is listed for ten minutes."""
    if end is not None:
        await session.client.vms.end_exec_session(name, end)
        if not session.out.json:
            session.out.line(f"{safe(end)} is ended")
        return
    found = await session.client.vms.exec_sessions(name)
    rows = (
        (
            one.id,
            "running" if one.end is None else _how(one.end),
            "yes" if one.attached else "no",
            span(one.age_s),
            " ".join(one.command)[:60],
        )
        for one in found
    )
    session.out.listing(found, ("ID", "STATUS", "ATTACHED", "AGE", "COMMAND"), rows, status_column=1)


def _how(end: ExecEnd) -> str:
    if end.exit_code is not None:
        return f"exit {end.exit_code}"
    return f"signal {end.signal}" if end.signal is not None else end.code or "failed"
