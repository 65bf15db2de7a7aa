"""`volantd restore`: replaces the database with a backup while no daemon runs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import apsw
import trio

from volant.host import Host
from volant.journal import DatabaseRefused, restore_offline
from volant.logs import VmLogs
from volant.model import Caller, Cause, Problem
from volant.vm import instance_of

from ._directories import DirectoryError, claimed, confine, log_dir
from ._leftovers import evidence_of
from ._run import DaemonError
from ._settings import Settings, parse_uids

_MAGIC = b"SQLite format 3\0"


def restore(settings: Settings, file: Path, *, replace: bool) -> str:
    """Restores a backup. Returns a report for people. :raises DaemonError: it fails; nothing has changed."""
    check_backup(file)
    try:
        with claimed(settings):
            return trio.run(_restore, settings, file, replace)
    except DirectoryError as error:
        raise DaemonError(f"{error}; for a running daemon use `volar system restore`") from error


def check_backup(file: Path) -> None:
    """Checks that a file is a database, before anything is created. :raises DaemonError: it is not."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise DaemonError(f"{file} is not a regular file; pass a file that `volar system backup` wrote")
        with file.open("rb") as backup:
            begin = backup.read(len(_MAGIC))
    except OSError as error:
        raise DaemonError(f"{file} can't be read: {error.strerror}") from None
    if begin != _MAGIC:
        raise DaemonError(
            f"{file} can't be restored: it is not an SQLite database; pass a file that `volar system backup` wrote"
        )


def _user() -> Caller:
    """Returns the user of this host who restores, named like a caller at the Unix socket."""
    name = f"uid {os.getuid()}"
    return Caller(name, name, address=name)


async def _restore(settings: Settings, file: Path, replace: bool) -> str:
    host = Host(users=parse_uids(settings.vm_uids))
    confine(host, settings)
    path = settings.state_dir / "volant.db"
    instance = instance_of(settings.state_dir)
    evidence = await evidence_of(host, settings, VmLogs(host, log_dir(settings)))
    try:
        cause = Cause(operation="restore", caller=_user(), request_id="volantd-restore")
        done = await host.threads.run(
            lambda: restore_offline(host, path, file, evidence, instance, replace=replace, cause=cause)
        )
    except Problem as problem:
        raise DaemonError(f"{problem.detail}; {problem.hint}" if problem.hint else problem.detail) from None
    except DatabaseRefused as refused:
        raise DaemonError(f"{file} can't be restored: {refused}") from None
    except (OSError, apsw.Error) as error:
        raise DaemonError(f"the database can't be written: {error}") from None
    lines = [f"restored {done.vms} VMs from {file}; the events have the epoch {done.epoch}"]
    if done.aside is not None:
        lines.append(f"the previous database is {done.aside}")
    if done.refused is not None:
        lines.append(f"it can't be read, so VMs that the backup lacks are not known: {done.refused}")
    if done.locked and settings.api_key is None:
        lines.append(
            "TCP needs credentials from now on, as it may have needed them before, and no API key is left: set "
            "api_key_file, or create a key over the Unix socket"
        )
    return "\n".join(lines)
