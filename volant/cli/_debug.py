"""`volar debug`: data for bug reports."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import click
import trio

from ._bundle import Bundle, gather
from ._lazy_group import LazyGroup
from ._options import Options, common, pass_options
from ._output import Output
from ._run import CONFLICT, Failure, guarded
from ._streaming import client_of
from ._target import target_of


@click.group(name="debug", cls=LazyGroup)
def group() -> None:
    """Collect information for a bug report."""


@group.command("bundle")
@common()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: volant-debug-<time>.tar.gz here.")
@click.option("--log", type=click.Path(path_type=Path), help="The daemon's log, if it is not in systemd's journal.")
@click.option("--consoles", is_flag=True, help="Also the last output of crashed guests, which may contain secrets.")
@pass_options
def bundle(options: Options, output: Path | None, log: Path | None, consoles: bool) -> int:
    """Write one file for a bug report: versions, the host, settings, log, VMs, events, what every task does.

    Without a running daemon it contains only data of the host. As root it finds more. Keys, tokens, queries,
    environments, kernel command lines and values of labels are left out. Check it before you share it.
    """

    def work() -> int:
        name = f"volant-debug-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        path = output if output is not None else Path(f"{name}.tar.gz")
        if log is not None and not log.is_file():
            raise click.UsageError(f"--log: there is no file {log}")
        out = Output(options.json)
        key = target_of(options).api_key

        async def run() -> Bundle:
            async with client_of(options) as client:
                return await gather(client, [key] if key else [], log, consoles)

        gathered = trio.run(run)
        _write(path, gathered.archive(name))
        if options.json:
            out.document({"path": str(path), "members": list(gathered.members), "missing": gathered.missing})
            return 0
        for what, why in gathered.missing.items():
            out.note(f"missing: {what}: {why}")
        out.note("check it before you share it")
        out.line(str(path))
        return 0

    return guarded(options, work)


def _write(path: Path, data: bytes) -> None:
    """Writes a new file that only its owner can read. :raises Failure: it exists, or can't be written"""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Failure(f"{path} exists already", code=CONFLICT, hint="name another file with --output") from None
    except OSError as error:
        raise Failure(f"{path} can't be written: {error.strerror}") from error
    with os.fdopen(fd, "wb") as file:
        file.write(data)
