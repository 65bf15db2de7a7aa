"""The console in Debian's Chromium, used as people use it, against a real daemon; axe-core looks at each view."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import trio

from tests.api.kit import api
from tests.bench._journal import Writer
from tests.chromium import CHROMIUM, needs_chromium
from tests.conformance.kit import JS, Node
from tests.ports import free_port
from tests.processes import killed_after, read_line
from tests.system.kit import Daemon, load
from volant.http import ApiSettings, Limits
from volant.journal import CommitSteps, CreateRow, JournalRef
from volant.model import DEFAULT_PROJECT, CreateVm, Reason, Status, Step, VmRow

pytestmark = needs_chromium

_PATIENCE_S = 120.0
VMS = load("VOLANT_TEST_VMS", usual=200, full=2000)
CHANGES_PER_S = 50
KEY = "a-key-of-the-settings-0123456789"
HOSTILE = "<script>executed=1</script>\x1b[2J\u202etxt.exe <b onclick=executed=1>" + "w" * 300


def play(
    node: Node, scenario: str, url: str, do: dict[str, Callable[[], object]], *arguments: str
) -> list[dict[str, Any]]:
    """Runs a scenario; does what it asks for. Returns what it saw, after a check that nothing went wrong."""
    process = subprocess.Popen(
        node.command("console.mjs", scenario, url, *arguments),
        cwd=JS, env={**node.environ, "CHROMIUM": str(CHROMIUM)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    seen: list[dict[str, Any]] = []
    with killed_after(_PATIENCE_S, process):
        assert process.stdin is not None
        while "problems" not in (said := json.loads(read_line(process, _PATIENCE_S))):
            if "do" in said:
                process.stdin.write(json.dumps(do[said["do"]]()) + "\n")
                process.stdin.flush()
            else:
                seen.append(said)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, f"{errors}\n{seen}\n{said}"
    assert said["problems"] == [], said["problems"]
    return seen


def test_a_person_creates_uses_and_deletes_a_vm_and_signs_in(node: Node, make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--listen", f"127.0.0.1:{free_port()}", ephemeral=False)
    url = daemon.base_url

    def keys() -> dict[str, str]:
        made = {}
        for name, role in (("root", "admin"), ("watcher", "viewer")):
            fields = {"name": name, "role": role}
            answer = httpx.post(f"{url}/api/v1/keys", json=fields, headers=daemon.headers, timeout=_PATIENCE_S)
            made[role] = answer.raise_for_status().json()["key"]
            daemon.use_key(made["admin"])
        return made

    def inspect() -> object:
        answer = httpx.get(f"{url}/api/v1/vms/walker/inspect", timeout=_PATIENCE_S)
        found = answer.raise_for_status().json()
        return found["actor"]["actor"]["process"]["sandbox"]

    seen = play(node, "walk", url, {"inspect": inspect, "kill": daemon.kill, "start": daemon.start, "keys": keys})
    facts = {name: value for one in seen for name, value in one.items()}
    assert facts["command"] == (
        "volar vms create walker --memory 128 --label 'note=<img src=x onerror=executed=1>' \\\n    --wait"
    )
    assert " ".join(facts["again"].replace("\\", "").split()) == (
        "volar vms create walker --cpus 1 --memory 128 --network none "
        "--label 'note=<img src=x onerror=executed=1>' --wait"
    )
    assert "a new VM" in facts["origin"]
    assert facts["edges"] == 4
    assert facts["lives"] == {"running": 3, "kept": 1, "gone": 1}
    assert facts["later"] == {"running": 3, "kept": 1, "gone": 2}
    assert facts["curl"] == (
        f"curl {url}/api/v1/networks \\\n  -H 'Content-Type: application/json' -d '{{\"name\": \"tried\"}}'"
    )
    assert facts["sends"] == 0
    assert facts["opened"] == "8080-1.localhost"
    assert facts["recovered"] == "navigate", "the page was loaded again"
    assert (facts["offered"], facts["refused"]) == (0, 403)
    assert (facts["scripts"], facts["stored"]) == ("", False)


async def test_many_vms_scroll_and_filter_while_they_change(node: Node, tmp_path: Path) -> None:
    async with api(tmp_path, limits=Limits(), checked=False) as served:
        journal = served.deps.journal
        for number in range(0, VMS, 100):
            async with trio.open_nursery() as nursery:
                for one in range(number, number + 100):
                    nursery.start_soon(_create, journal, f"vm{one}")
        rows = {row.name: row for row in served.deps.store.projection.rows()}
        assert len(rows) == VMS
        for name in ("vm7", "vm8"):
            row = rows[name]
            for status in (Status.STARTING, Status.CRASHED):
                reason = Reason("<i>code</i>", HOSTILE, (HOSTILE,)) if status is Status.CRASHED else None
                row = await _commit(journal, row, msgspec.structs.replace(row, status=status, reason=reason))
        changing = trio.Event()
        writers = [Writer(journal, rows[f"vm{number}"]) for number in range(VMS // 20, VMS - VMS // 20, 7)]

        async def change() -> None:
            await changing.wait()
            while True:
                for writer in writers:
                    await writer.change()
                    await trio.sleep(1 / CHANGES_PER_S)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            token = trio.lowlevel.current_trio_token()
            ends = (max(rows, key=lambda name: rows[name].id), min(rows, key=lambda name: rows[name].id))
            do: dict[str, Callable[[], object]] = {
                "change": lambda: trio.from_thread.run_sync(changing.set, trio_token=token)
            }
            url = f"http://127.0.0.1:{served.server.port}"
            seen = await trio.to_thread.run_sync(lambda: play(node, "many", url, do, *ends, str(VMS)))
            nursery.cancel_scope.cancel()
        facts = seen[-1]
        # docs/explanation/console.md has what a quiet machine takes.
        print(facts)
        assert facts["rows"] < 80, "rows that nobody sees are in the document"


async def test_a_second_session_has_one_stream_and_no_guest_ends_or_stalls_it(node: Node, tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=(KEY,)), limits=Limits(), checked=False) as served:
        url = f"http://127.0.0.1:{served.server.port}"
        seen = await trio.to_thread.run_sync(lambda: play(node, "again", url, {}, KEY))
    filled = {
        "url": "x y", "count": 3, "kind": 1, "flag": True, "tags": ["one"], "__proto__": 0.5, "deep": {"a": [1]},
    }  # fmt: skip
    assert seen == [
        {"open": 1},
        {"status": 401, "signedIn": 1},
        {"none": [*["none"] * 5, "0x8", "none", "none"]},
        {"sent": [filled, [5]], "offered": [1, 0]},
        {
            "images": [
                ["Image", "Digest", "Platform", "Size", "Layers", "Used by", "Last used", "Actions"],
                [
                    "registry.example/web:1 and 1 more names",
                    "abababababab",
                    "linux/amd64",
                    "3.0 MiB",
                    "2",
                    "VM web",
                    "5 d",
                    "Delete…",
                ],
            ]
        },
        {
            "templates": [
                ["Plugin", "Digest", "State", "Machine", "After", "On disk", "Clones", "Age", "Actions"],
                ["base", "cdcdcdcdcdcd", "ready", "2 × 256 MiB", "agent", "1.0 MiB", "7", "5 d", "Delete…"],
            ]
        },
        {
            "secrets": [
                ["Name", "Version", "Readable", "Used by", "Set", "Actions"],
                ["token", "3", "the key is missing", "nothing", "5 d", "Delete…"],
            ]
        },
        {
            "keys": [
                ["Name", "Role", "Project", "Made by", "Expires", "Last used", "Age", "Actions"],
                ["ci", "operator", "all", "key:root", "never", "5 d ago, from 192.0.2.1", "5 d", "Delete…"],
            ]
        },
        {"saved": True, "edited": 0},
        {"way": " --failover restart --zone r1 --host-label disk=nvme \\\n    --anti-affinity app=db --wait"},
        {
            "way": '\'{"name":"placed","failover":"restart",'
            '"placement":{"zone":"r1","labels":{"disk":"nvme"},"anti_affinity":{"app":"db"}}}\''
        },
        {
            "way": '(name="placed", failover="restart", '
            'placement=Placement(zone="r1", labels={"disk": "nvme"}, anti_affinity={"app": "db"})))'
        },
        {"way": '(name="placed", failover="restore", replicate=Replicate(every="10m", to=1)'},
        {"posted": ["POST /api/v1/hosts/h1/drain", "POST /api/v1/hosts/h3/undrain"], "left": [0, 0], "steered": 0},
    ]


async def test_tabs_share_a_stream_and_the_next_one_takes_over_without_a_hole(node: Node, tmp_path: Path) -> None:
    async with api(tmp_path, limits=Limits(), checked=False) as served:
        journal = served.deps.journal
        for name in ("one", "two", "three"):
            await _create(journal, name)
        writers = [Writer(journal, row) for row in served.deps.store.projection.rows()]
        changing, stopping, stopped = trio.Event(), trio.Event(), trio.Event()

        async def change() -> None:
            await changing.wait()
            while not stopping.is_set():
                for writer in writers:
                    await writer.change()
                    await trio.sleep(1 / CHANGES_PER_S)
            stopped.set()

        async def stop() -> int:
            stopping.set()
            await stopped.wait()
            return served.deps.store.projection.last_event.seq

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            token = trio.lowlevel.current_trio_token()
            do: dict[str, Callable[[], object]] = {
                "change": lambda: trio.from_thread.run_sync(changing.set, trio_token=token),
                "stop": lambda: trio.from_thread.run(stop, trio_token=token),
            }
            url = f"http://127.0.0.1:{served.server.port}"
            seen = await trio.to_thread.run_sync(lambda: play(node, "tabs", url, do))
            nursery.cancel_scope.cancel()
    assert seen == [
        {"streams": [1, 0, 0], "lists": [1, 0, 0]},
        {"holes": [0, 0], "same": 1, "streams": [0, 1], "lists": [0, 0]},
        {"heard": [["missed"], ["replace", "all"], ["take", "two"]]},
    ]


async def _create(journal: JournalRef, name: str) -> None:
    request = CreateVm(
        name=name, cpu_cores=1, memory_mb=128, labels={"team": "web", "note": "<img src=x onerror=executed=1>"}
    )
    await journal.ask(CreateRow(request, DEFAULT_PROJECT), timeout_s=60)


async def _commit(journal: JournalRef, row: VmRow, changed: VmRow) -> VmRow:
    found = await journal.ask(CommitSteps(row.id, row.revision, (Step(changed, HOSTILE),)), timeout_s=60)
    assert found is not None
    return found
