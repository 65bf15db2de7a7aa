"""Acknowledged changes survive `kill -9`, and no event is torn, missing or repeated."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import apsw
import trio

from tests.journal.kit import running

CHILD = """
import sys, trio
from pathlib import Path
from tests.journal.kit import running
from volant.model import Status

async def writer(bench, number):
    turn = 0
    while True:
        row = await bench.create(f"vm-{number}-{turn}")
        row = await bench.to(row, Status.STARTING, Status.RUNNING)
        print(f"{row.id} {row.revision}", flush=True)
        if turn % 3 == 0:
            await bench.delete(row)
            print(f"{row.id} 0", flush=True)
        turn += 1

async def main():
    async with running(Path(sys.argv[1])) as bench, trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(writer, bench, f"{sys.argv[2]}-{number}")

trio.run(main)
"""


def test_acknowledged_is_on_the_disk_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "volant.db"
    acknowledged: dict[int, int] = {}
    for turn in range(2):
        child = subprocess.Popen([sys.executable, "-c", CHILD, path, str(turn)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for count, line in enumerate(child.stdout):
            vm_id, revision = map(int, line.split())
            acknowledged[vm_id] = revision
            if count == 150:
                child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()

        connection = apsw.Connection(str(path))
        frames = connection.execute("SELECT seq, frame FROM events ORDER BY seq").fetchall()
        rows = {
            int(str(vm_id)): int(str(revision))
            for vm_id, revision in connection.execute("SELECT id, revision FROM vms")
        }
        connection.close()
        assert [seq for seq, _ in frames] == list(range(1, len(frames) + 1))
        told: dict[int, list[str]] = {}
        for seq, frame in frames:
            event = json.loads(bytes(frame))  # type: ignore[arg-type]  # a BLOB column
            assert event["id"].endswith(f"-{seq}")
            told.setdefault(event["vm_id"], []).append(event["type"])
        for vm_id, revision in acknowledged.items():
            # A later commit may have reached the disk and not its asker.
            assert rows.get(vm_id, 0) >= revision or told[vm_id][-1] == "VM_DELETED"
            assert revision or vm_id not in rows
        life = ["VM_CREATED", "VM_STARTING", "VM_RUNNING", "VM_STOPPING", "VM_DELETED"]
        for vm_id, seen in told.items():
            assert seen == life[: len(seen)]
            assert (vm_id in rows) == (seen[-1] != "VM_DELETED")

    async def load() -> None:
        async with running(path) as bench:
            assert {row.id: row.revision for row in bench.store.projection.rows()} == rows

    trio.run(load)
