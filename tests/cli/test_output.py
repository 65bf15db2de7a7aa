"""People get tables and colours, pipes plain columns, programs JSON."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.client.kit import answer, event, log_line, problem, serving, sse, vm, websocket
from volant import __version__
from volant.cli._boot_images import default_cache_dir
from volant.cli._text import size, span
from volant.daemon._command_line import load

from .kit import ENVIRONMENT, ROOT, command, volar

LONG = "x" * 63
TREE = {
    "name": "volantd", "kind": "supervisor", "state": "running", "restarts": 0,
    "children": [
        {"name": "journal", "kind": "actor", "state": "running", "restarts": 2, "mailbox": {"depth": 3, "capacity": 9}},
        {"name": "vms", "kind": "supervisor", "state": "running", "children": [{"name": "demo", "state": "waiting"}]},
    ],
}  # fmt: skip

PATH = "GET /api/v1/events/vms"
GAP = 'event: STREAM_GAP\nid: e-8\ndata: {"type":"STREAM_GAP","requested":"e-3","oldest":"e-9","newest":"e-20"}'


async def test_pipes_get_columns_that_are_neither_coloured_nor_cut() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer(
            [vm(name=LONG), vm(status="crashed", reason={"code": "x", "message": ""})]
        )
        done = await volar(server, "vms", "list", environ={"COLUMNS": "20"})
    title, first, second = done.out.decode().splitlines()
    assert title.split() == ["NAME", "STATUS", "PLUGIN", "CPUS", "MEMORY", "ADDRESS", "UP", "RESTARTS", "REASON"]
    assert first.split()[:2] == [LONG, "running"]
    assert second.split()[:2] == ["demo", "crashed"]
    assert b"\x1b" not in done.out


async def test_programs_get_the_answer_of_the_api() -> None:
    found = vm(labels={"a": "b"})
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([found])
        server.routes["GET /api/v1/vms/demo"] = answer(found)
        server.routes["DELETE /api/v1/vms/demo"] = answer(None, 204)
        every = await volar(server, "vms", "list", "--json")
        one = await volar(server, "--json", "vms", "get", "demo")
        gone = await volar(server, "vms", "delete", "demo", "--json")
    assert json.loads(every.out) == [found]
    assert json.loads(one.out) == found
    assert json.loads(gone.out) == {"name": "demo", "deleted": True}


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
async def test_terminals_get_colours_unless_they_are_not_wanted(no_color: str, coloured: bool) -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([vm(name="a[bold]b", status="crashed")])
        environ = ENVIRONMENT | {"VOLANT_API_BASE": server.base_url, "TERM": "xterm", "NO_COLOR": no_color}
        master, slave = pty.openpty()
        try:
            done = await trio.run_process(command("vms", "list"), stdout=slave, check=False, env=environ, cwd=ROOT)
            text = os.read(master, 65536).decode()
        finally:
            os.close(slave)
            os.close(master)
    assert done.returncode == 0
    assert "a[bold]b" in text
    assert ("\x1b[31m" in text) == coloured


async def test_logs_are_lines() -> None:
    async with serving() as server:
        server.routes["GET /ws/v1/vms/demo/logs"] = websocket(
            log_line(1, "one"), {"gap": {"from": 2, "to": 3}}, log_line(4, "ä\x1b[2J")
        )
        plain = await volar(server, "vms", "logs", "demo", "--tail", "5", "-t")
        lines = await volar(server, "vms", "logs", "demo", "--json")
    assert plain.code == 0
    assert plain.out.decode() == "2025-09-24T12:34:56.000Z  one\n2025-09-24T12:34:56.000Z  ä\x1b[2J\n"
    assert "lines 2 to 3" in plain.err
    assert [json.loads(line).get("seq") for line in lines.out.splitlines()] == [1, None, 4]
    assert dict(server.requests[0].query) == {"tail": "5", "follow": "false"}


async def test_the_tree_is_drawn() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/system/tree"] = answer(TREE)
        done = await volar(server, "system", "tree")
        data = await volar(server, "system", "tree", "--json")
    assert done.out.decode().splitlines() == [
        "volantd  supervisor  running",
        "├─ journal  actor  running  2 restarts  3 messages waiting",
        "└─ vms  supervisor  running",
        "   └─ demo  waiting",
    ]
    assert json.loads(data.out) == TREE


PLUGIN = {
    "name": "p",
    "version": "1",
    "description": "",
    "runtime": "base",
    "enabled": True,
    "builtin": False,
    "created_at": None,
    "labels": {},
}


async def test_plugins_come_from_toml_or_json(tmp_path: Path) -> None:
    manifest = tmp_path / "m.toml"
    manifest.write_text('name = "p"\n[workload]\nentrypoint = ["x"]\n')
    async with serving() as server:
        server.routes["POST /api/v1/plugins"] = answer(PLUGIN, 201)
        done = await volar(server, "plugins", "install", str(manifest))
        manifest.write_text("name =")
        wrong = await volar(server, "plugins", "install", str(manifest))
    assert done.out == b"p 1 is installed\n"
    assert server.requests[0].json() == {"name": "p", "workload": {"entrypoint": ["x"]}}
    assert wrong.code == 1
    assert "can't be parsed" in wrong.err


async def test_images_need_no_daemon(tmp_path: Path) -> None:
    listed = await volar(None, "boot-images", "list", "--json", environ={"VOLANT_CACHE_DIR": str(tmp_path)})
    failed = await volar(None, "boot-images", "build", "--offline", "--cache", str(tmp_path))
    assert json.loads(listed.out) == []
    assert failed.code == 1
    assert "without --offline" in failed.err


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("environ", [{}, {"HOME": "/h"}, {"HOME": "/h", "XDG_CACHE_HOME": "/c"}])
def test_the_default_cache_is_the_daemons(uid: int, environ: dict[str, str]) -> None:
    assert default_cache_dir(environ, uid) == load([], environ, uid=uid)[0].cache_dir


def test_the_version_imports_no_commands() -> None:
    code = (
        "import sys; from volant.cli.main import run; run(['--version'])\n"
        "sys.exit(' '.join({'trio', 'httpx', 'rich', 'msgspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.stdout, done.stderr.strip()) == (f"volar {__version__}\n", "")


def test_the_reference_matches_the_commands() -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "docs/build.py", "--check"], cwd=ROOT, check=True, env=environ)


def test_times_and_sizes_are_printed_for_people() -> None:
    assert [span(seconds) for seconds in (0, 59.9, 60, 3700, 90061)] == ["0s", "59s", "1m", "1h1m", "1d1h"]
    assert [size(count) for count in (5, 2048, 70 * 2**20, 3 * 2**30)] == ["5 B", "2.0 KiB", "70.0 MiB", "3.0 GiB"]


@pytest.mark.parametrize("words", [("events", "--vm", "demo"), ("vms", "watch", "demo")])
async def test_events_resume_and_gaps_are_reported(words: tuple[str, ...]) -> None:
    async with serving() as server:
        server.routes[PATH] = [
            sse("retry: 10", event(2)),
            sse(GAP, event(9)),
            problem(410, "events-gone", "enough"),
        ]
        done = await volar(server, *words, "--since", "e-1", "--type", "VM_RUNNING", "--label", "a=b")
    assert done.code == 1
    assert [text.rpartition("message ")[2] for text in done.out.decode().splitlines()] == ["2", "9"]
    assert "events are lost" in done.err
    assert done.err.count("trying again") == 1
    first, second, third = server.asked("/api/v1/events/vms")
    assert dict(first.query) == {"vm": "demo", "types": "VM_RUNNING", "label": "a=b"}
    assert [request.headers["last-event-id"] for request in (first, second, third)] == ["e-1", "e-2", "e-9"]


async def test_json_is_a_line_for_each_event_and_gap() -> None:
    async with serving() as server:
        server.routes[PATH] = [sse(event(2), GAP, event(9)), problem(410, "events-gone", "enough")]
        done = await volar(server, "events", "--json", "--since", "0")
    items = [json.loads(text) for text in done.out.splitlines()]
    assert [item.get("id", item["type"]) for item in items] == ["e-2", "STREAM_GAP", "e-9"]
    assert json.loads(done.err)["error"]["code"] == "events-gone"
