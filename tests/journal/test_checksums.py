"""A changed byte on the disk is detected: at the start, in a backup and in a restore."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from tests.attackers.crafted_backup import make
from tests.journal.kit import running
from volant.host import Host
from volant.journal import Backups, DatabaseRefused, Evidence, restore_offline
from volant.model import Problem


def change_a_byte(path: Path, word: bytes) -> None:
    """In the middle of what somebody has written: the structure is as sound as before."""
    data = bytearray(path.read_bytes())
    at = data.index(word)
    data[at] ^= 0x01
    path.write_bytes(data)


def is_sound_to_sqlite(path: Path) -> bool:
    """To one that knows of no checksums: in a process of its own, as they are this one's."""
    code = f"import apsw; print(apsw.Connection({str(path)!r}).pragma('integrity_check'))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"ok\n"


async def test_a_changed_byte_keeps_the_daemon_from_starting(path: Path) -> None:
    async with running(path) as bench:
        await bench.create("one", labels={"word": "original"})
    change_a_byte(path, b"original")
    assert is_sound_to_sqlite(path)
    with pytest.raises(DatabaseRefused, match="its checksum differs"):
        async with running(path):
            pass


async def test_a_changed_byte_is_found_by_a_backup(path: Path) -> None:
    async with running(path) as bench:
        await bench.create("one", labels={"word": "original"})
        with apsw.Connection(str(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").get  # noqa: B018 - runs it
        connection.close()
        change_a_byte(path, b"original")
        with pytest.raises(Problem) as refused:
            async with Backups(Host(), bench.store).take():
                pass
        assert (refused.value.status, refused.value.code) == (503, "journal-damaged")


def test_a_changed_byte_in_a_backup_is_refused(tmp_path: Path) -> None:
    file = make(tmp_path / "backup.db")
    change_a_byte(file, b"crafted")
    with pytest.raises(DatabaseRefused, match="its checksum differs"):
        restore_offline(Host(), tmp_path / "other.db", file, Evidence(), "0" * 10, replace=False)
