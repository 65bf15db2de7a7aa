"""`volar audit`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import click

from volant.model import AuditGap, AuditRecord, Problem, parse_duration

from ._events import retrying
from ._streaming import Session, command
from ._text import clock, safe

_TAIL = 50


class Moment(click.ParamType[str]):
    """A time, or a duration before now."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        try:
            moment = datetime.now(UTC) - timedelta(seconds=parse_duration(text, "time"))
        except (Problem, OverflowError):
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                self.fail(f"{text[:40]!r} is neither a duration such as 2h nor a time such as 2025-09-24T12:34:56Z")
            moment = moment if moment.tzinfo is not None else moment.astimezone()
        return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@command(None, "audit")
@click.option("-f", "--follow", is_flag=True, help="Print new records as they are written, until interrupted.")
@click.option(
    "--tail", type=click.IntRange(0, 1000), help=f"Start with this number of the newest records; default {_TAIL}."
)
@click.option("--since", type=Moment(), help="Only records from this time on: 2h (ago), or 2025-09-24T12:34:56Z.")
@click.option("--until", type=Moment(), help="Only records before this time.")
@click.option("--caller", help="Only records of this caller, such as key:ci.")
@click.option("--operation", help="Only records of this operation, such as delete_vm.")
@click.option("--target", metavar="NAME", help="Only records about a VM or another target with this name.")
@click.option("--request", "request_id", metavar="ID", help="Only records of the request with this id.")
@click.option("--all", "everything", is_flag=True, help="Start with the oldest record.")
async def group(
    session: Session,
    follow: bool,
    tail: int | None,
    since: str | None,
    until: str | None,
    caller: str | None,
    operation: str | None,
    target: str | None,
    request_id: str | None,
    everything: bool,
) -> None:
    """Print the audit log: changes, refused requests and accesses to guests.

    Each line ends with an outcome and a request id. `begun` marks the start of an access or of a long change; `done`,
    or a status and an error code, its end. With --json, each line is a record of the API: `volar audit --all --json >
    FILE` exports all. --project prints only records of one project.
    """
    if tail is not None and (since is not None or everything):
        raise click.UsageError("--tail excludes --since and --all")
    out = session.out
    async with session.client.audit(
        tail=_TAIL if tail is None and since is None and not everything else tail,
        since=since,
        until=until,
        caller=caller,
        operation=operation,
        target=target,
        request_id=request_id,
        follow=follow,
        on_retry=retrying(out.note),
    ) as feed:
        async for item in feed:
            if out.json:
                out.item(item)
            elif isinstance(item, AuditGap):
                out.note(f"volar: records {item.gap.first} to {item.gap.last} are not kept any more")
            else:
                out.line(_line(item))


def _line(record: AuditRecord) -> str:
    who = record.caller if record.caller == record.address else f"{record.caller} {record.address}".strip()
    what = " ".join(part for part in (record.operation, record.target, record.detail and f"({record.detail})") if part)
    where = f"{record.project}  " if record.project not in (None, "default") else ""
    return f"{clock(record.time)}  {safe(who)}  {where}{safe(what)}  {safe(record.outcome)}  {safe(record.request_id)}"
