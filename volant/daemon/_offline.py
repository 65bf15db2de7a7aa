"""`volantd restore`: put a backup in the place of a database that no daemon uses, or can use."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import apsw
import trio

from volant.host import Host
from volant.journal import DatabaseRefused, VmLogs, restore_offline
from volant.model import Problem
from volant.vm import instance_of

from ._daemon import DaemonError, evidence_of
from ._directories import DirectoryError, claimed, confine, log_dir
from ._settings import Settings


def parse(argv: Sequence[str]) -> tuple[Path, bool, list[str]]:
    """What follows `volantd restore`: the file, `--replace`, and the settings."""
    parser = argparse.ArgumentParser(
        prog="volantd restore",
        description="Put a backup in the place of the database, while no volantd runs. The database that is there is "
        "kept beside it, also when it is damaged. VMs that run go on. Takes all settings of volantd besides.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="what `volar system backup` has written")
    parser.add_argument("--replace", action="store_true", help="also when there are VMs that the backup does not know")
    options, rest = parser.parse_known_args(argv)
    return options.file, options.replace, rest


def restore(settings: Settings, file: Path, *, replace: bool) -> str:
    """Do it; a line that says what was done. :raises DaemonError: it can't be done, and nothing is changed."""
    try:
        with claimed(settings), _readable(file):
            return trio.run(_restore, settings, file, replace)
    except DirectoryError as error:
        raise DaemonError(f"{error}; for one that runs there is `volar system restore`") from error


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        os.close(os.open(file, os.O_RDONLY))
    except OSError as error:
        raise DaemonError(f"{file} can't be read: {error.strerror}") from None
    yield


async def _restore(settings: Settings, file: Path, replace: bool) -> str:
    host = Host()
    confine(host, settings)
    path = settings.state_dir / "volant.db"
    instance = instance_of(settings.state_dir)
    evidence = await evidence_of(host, settings, VmLogs(host, log_dir(settings)))
    try:
        done = await host.run_blocking(lambda: restore_offline(host, path, file, evidence, instance, replace=replace))
    except Problem as problem:
        raise DaemonError(f"{problem.detail}; {problem.hint}" if problem.hint else problem.detail) from None
    except DatabaseRefused as refused:
        raise DaemonError(f"{file} can't be restored: {refused}") from None
    except (OSError, apsw.Error) as error:
        raise DaemonError(f"the database can't be written: {error}") from None
    lines = [f"restored {done.vms} VMs from {file}; the events have the epoch {done.epoch}"]
    if done.aside is not None:
        lines.append(f"the database of before lies in {done.aside}")
    if done.refused is not None:
        lines.append(f"it could not be looked at for VMs that the backup does not know: {done.refused}")
    return "\n".join(lines)
