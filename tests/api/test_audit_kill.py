"""`kill -9` of a process with the whole API: what was done has its record, and what has a record was done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import apsw

from tests.processes import killed_after

ROUNDS = 4
ENOUGH = 60
"""Answers before the kill."""
WITHIN_S = 60.0
"""Deadline of these answers, which take less than a second on an idle machine."""

CHILD = """
import sys, trio
from pathlib import Path
from tests.api.kit import api

async def user(served, number):
    turn = 0
    while True:
        turn += 1
        name = f"of-{number}-{turn}"
        for method, path, body in (
            ("POST", "/api/v1/plugins", {"name": name, "resources": {"memory_mb": 64}}),
            ("POST", "/api/v1/vms", {"name": name, "cpu_cores": 1, "memory_mb": 128}),
            ("POST", f"/api/v1/vms/{name}/stop", None),
            ("POST", f"/api/v1/vms/none/start", None),
            ("DELETE", f"/api/v1/plugins/{name}", None) if turn % 2 else ("POST", "/api/v1/system/prune", None),
        ):
            request_id = f"{method}-{path.rpartition('/')[2]}-{name}"
            answer = await served.client.request(method, path, json=body, headers={"X-Request-Id": request_id})
            print(request_id, answer.status_code, flush=True)

async def main():
    async with api(Path(sys.argv[1]), checked=False) as served, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(user, served, number)

trio.run(main)
"""


def answers_before_kill(path: Path, enough: int) -> dict[str, int]:
    """Serves the API with its state in `path`, kills it after so many answers, and returns the status of each."""
    answers: dict[str, int] = {}
    errors = path / "stderr"
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as child,
        killed_after(WITHIN_S, child),
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                request_id, code = line.split()
                answers[request_id] = int(code)
                if len(answers) == enough:
                    child.kill()
        finally:
            child.kill()
    assert len(answers) >= enough, errors.read_text()
    return answers


def test_records_and_changes_are_one_after_kill_9(tmp_path: Path) -> None:
    for turn in range(ROUNDS):
        path = tmp_path / str(turn)
        path.mkdir()
        answers = answers_before_kill(path, ENOUGH + turn)

        connection = apsw.Connection(str(path / "volant.db"))
        records = [json.loads(data) for (data,) in connection.execute("SELECT record FROM audit ORDER BY seq")]
        events = [json.loads(data) for (data,) in connection.execute("SELECT frame FROM events ORDER BY seq")]
        plugins = {str(name) for (name,) in connection.execute("SELECT name FROM named WHERE kind = 'plugin'")}
        vms = {str(name) for (name,) in connection.execute("SELECT name FROM vms")}
        connection.close()

        assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
        outcomes: dict[str, list[str]] = {}
        done: dict[str, set[str]] = {}
        for record in records:
            outcomes.setdefault(record["request_id"], []).append(record["outcome"])
            if record["outcome"] == "done":
                done.setdefault(record["operation"], set()).add(record["target"])
        for request_id, status in answers.items():
            assert outcomes[request_id][-1] == ("done" if status < 300 else f"{status} vm-not-found"), request_id
        assert vms == done["create_vm"]
        assert plugins == done["install_plugin"] - done.get("delete_plugin", set())
        assert {event["request_id"] for event in events if "request_id" in event} <= outcomes.keys()
