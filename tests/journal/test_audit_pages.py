"""Pages of the audit log hold what was asked for, and cost what they hold, not what the log holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from volant.host import Host
from volant.journal import AuditFilter
from volant.journal._audit import AuditPages
from volant.journal._schema import open_writer
from volant.model import AuditRecord

RECORDS = 20_000
RARE = (5_000, 5_001, 15_000)
"""The numbers of the records that differ from all others."""
BEGAN = 1_790_000_000
_STEPS = 100


def record(seq: int) -> AuditRecord:
    rare = seq in RARE
    return AuditRecord(
        seq=seq,
        time=at(seq),
        caller="key:seldom" if rare else "uid 0",
        # An id may be like the name of another caller.
        caller_id="key:twin" if rare else "key:seldom" if seq == 1 else "uid 0",
        address="10.0.0.1",
        project="small" if rare else "default",
        operation="rotate_key" if rare else "run_command",
        target="gem" if rare else "web",
        vm_id=None,
        outcome="done",
        request_id=f"r{seq}",
        detail="",
    )


def at(seq: int) -> datetime:
    # Once the clock was set back.
    return datetime.fromtimestamp(BEGAN + seq - (5_000 if seq > 10_000 else 0), UTC)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "volant.db"
    connection = open_writer(Host(), path)
    with connection:
        for one in map(record, range(1, RECORDS + 1)):
            columns = (one.caller, one.caller_id, one.project, one.operation, one.target, one.request_id)
            connection.execute(
                "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (one.seq, int(one.time.timestamp()), *columns, msgspec.json.encode(one)),
            )
    connection.close()
    return path


class Counted(AuditPages):
    """Counts the steps of SQLite's virtual machine."""

    steps = 0

    @contextmanager
    def reader(self) -> Iterator[apsw.Connection]:
        def step() -> bool:
            self.steps += _STEPS
            return False

        with super().reader() as connection:
            connection.set_progress_handler(step, _STEPS)
            yield connection
            connection.set_progress_handler(None)


FILTERS: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({}, 2_000),
    "caller": ({"caller": "key:seldom"}, 2_000),
    "caller id": ({"caller": "key:twin"}, 2_000),
    "project": ({"project": "small"}, 2_000),
    "operation": ({"operation": "rotate_key"}, 2_000),
    "target": ({"target": "gem"}, 2_000),
    "request": ({"request_id": "r777"}, 2_000),
    "nothing": ({"request_id": "no such"}, 2_000),
    "times": ({"since": at(12_000), "until": at(12_010)}, 160_000),
    # Counting what many have is the price of choosing well.
    "many and few": ({"caller": "uid 0", "operation": "rotate_key", "project": "default"}, 60_000),
    "all": ({"caller": "key:seldom", "project": "small", "operation": "rotate_key", "target": "gem"}, 2_000),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("newest", [True, False])
def test_a_page_holds_what_was_asked_for_and_reads_little_else(path: Path, name: str, newest: bool) -> None:
    fields, most = FILTERS[name]
    wanted = AuditFilter(**fields)
    pages = Counted(path)
    after, limit = 3, 10
    page = pages.find(wanted, after, limit, newest)
    every = [seq for seq in range(after + 1, RECORDS + 1) if wanted.wants(record(seq))]
    assert [frame.seq for frame in page.frames] == (every[-limit:] if newest else every[:limit])
    assert page.oldest == 1
    assert pages.steps <= most
