"""A changed byte on the disk is detected: at the start, while the daemon runs, in a backup and in a restore."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import apsw
import pytest
import trio

from tests.attackers.crafted_backup import make
from tests.journal.kit import TIMEOUT_S, running
from volant.host import Host
from volant.journal import Backups, DatabaseRefused, Evidence, restore_offline
from volant.journal import _journal as journal_module
from volant.journal._checksums import has_checksums
from volant.model import Problem

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "volant.db"


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


async def test_a_changed_byte_is_found_while_the_daemon_works(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_SCRUB_EVERY_S", 0.02)
    async with running(path) as bench:
        await bench.create("one", labels={"word": "original"})
        with apsw.Connection(str(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").get  # noqa: B018 - runs it
        connection.close()
        await trio.sleep(0.1)
        assert bench.store.damage is None
        change_a_byte(path, b"original")
        with trio.fail_after(TIMEOUT_S):
            while not (damage := bench.store.damage):  # noqa: ASYNC110 - nothing tells of it
                await trio.sleep(0.01)
        assert "its checksum differs" in damage  # type: ignore[unreachable]
        backups = Backups(Host(), bench.store, bench.journal, _nothing)
        with pytest.raises(Problem) as refused:
            async with backups.take():
                pass
        assert (refused.value.status, refused.value.code) == (503, "journal-damaged")


async def _nothing() -> Evidence:
    return Evidence()


async def test_a_database_without_checksums_goes_on_working(path: Path) -> None:
    """As earlier versions have made it."""
    connection = apsw.Connection(str(path), vfs="unix")
    connection.pragma("auto_vacuum", "incremental")
    connection.pragma("journal_mode", "wal")
    connection.close()
    for name in ("one", "two"):
        async with running(path) as bench:
            await bench.create(name)
    with apsw.Connection(str(path)) as connection:
        assert not has_checksums(connection)
        assert connection.pragma("integrity_check") == "ok"
    connection.close()


def test_a_restored_database_has_checksums_and_a_changed_backup_is_refused(path: Path, tmp_path: Path) -> None:
    restore_offline(Host(), path, make(tmp_path / "backup.db"), Evidence(), "0" * 10, replace=False)
    with apsw.Connection(str(path)) as connection:
        assert has_checksums(connection)
        assert connection.pragma("integrity_check") == "ok"
    connection.close()
    change_a_byte(tmp_path / "backup.db", b"crafted")
    with pytest.raises(DatabaseRefused, match="its checksum differs"):
        restore_offline(Host(), tmp_path / "other.db", tmp_path / "backup.db", Evidence(), "0" * 10, replace=False)
