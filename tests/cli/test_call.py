"""`volar call` sends what it is given and prints or keeps what the workload answers; plugins are shown and switched."""

from __future__ import annotations

import json
import os
import pty
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.client.kit import Handler, Request, Server, answer, problem, send_head, serving, vm
from volant.cli._downloads import download

from .kit import ENVIRONMENT, ROOT, command, volar

SHOT = "POST /api/v1/vms/demo/actions/web/shot"
MANIFEST: dict[str, Any] = {
    "name": "web",
    "version": "2",
    "workload": {"entrypoint": ["serve", "a b"], "port": 8080},
    "actions": {
        "shot": {
            "path": "/shot",
            "description": "Take a picture",
            "input": {"properties": {"url": {}, "full": {}}, "required": ["url"]},
        }
    },
}
PLUGIN = {
    "name": "web", "version": "2", "description": "", "runtime": "base", "enabled": True, "builtin": False,
    "created_at": "2025-09-24T12:34:56Z", "labels": {},
}  # fmt: skip


def guests(body: bytes, kind: str, status: int = 200) -> Handler:
    """What a guest answers, with the daemon's mark on it."""

    async def handler(request: Request, stream: trio.abc.Stream) -> None:
        del request
        marks = {"Content_Type": kind, "Content_Length": str(len(body)), "Content_Security_Policy": "sandbox"}
        await send_head(stream, status, **marks)
        await stream.send_all(body)

    return handler


def web(server: Server, handler: Handler) -> None:
    server.routes["GET /api/v1/vms/demo"] = answer(vm(plugin="web"))
    server.routes[SHOT] = handler


async def test_members_make_an_object_and_the_answer_is_passed_through() -> None:
    async with serving() as server:
        web(server, guests(b"\x89PNG\r\n", "image/png"))
        done = await volar(server, "call", "demo", "shot", "url=http://x/?a=b", "width:=800", "clip:=null")
    assert (done.code, done.out) == (0, b"\x89PNG\r\n")
    (asked,) = server.asked("/api/v1/vms/demo/actions/web/shot")
    assert asked.json() == {"url": "http://x/?a=b", "width": 800, "clip": None}
    assert asked.headers["content-type"] == "application/json"


async def test_without_anything_there_is_no_body() -> None:
    async with serving() as server:
        web(server, guests(b"", "text/plain"))
        assert (await volar(server, "call", "demo", "shot")).code == 0
    (asked,) = server.asked("/api/v1/vms/demo/actions/web/shot")
    assert asked.body == b""
    assert "content-type" not in asked.headers


async def test_a_body_is_sent_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "body"
    file.write_bytes(b"\0" * 200_000)
    async with serving() as server:
        web(server, guests(b"ok", "text/plain"))
        assert (await volar(server, "call", "demo", "shot", "-d", '{"a": 1}')).code == 0
        assert (await volar(server, "call", "demo", "shot", "-d", f"@{file}", "--type", "x/y")).code == 0
    inline, chunked = server.asked("/api/v1/vms/demo/actions/web/shot")
    assert (inline.body, inline.headers["content-type"]) == (b'{"a": 1}', "application/json")
    assert (chunked.headers["transfer-encoding"], chunked.headers["content-type"]) == ("chunked", "x/y")


async def test_the_answer_goes_into_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    async def broken(request: Request, stream: trio.abc.Stream) -> None:
        del request
        await send_head(stream, 200, Content_Length="10", Content_Security_Policy="sandbox")
        await stream.send_all(b"half")

    async with serving() as server:
        web(server, guests(b"\x89PNG", "image/png"))
        done = await volar(server, "call", "demo", "shot", "-o", str(tmp_path / "a.png"))
        assert (done.code, done.out) == (0, b"")
        web(server, broken)
        lost = await volar(server, "call", "demo", "shot", "-o", str(tmp_path / "b.png"))
        assert lost.code == 5
        web(server, guests(b"no such page", "text/plain", 422))
        refused = await volar(server, "call", "demo", "shot", "-o", str(tmp_path / "c.png"))
        assert (refused.code, refused.out) == (1, b"no such page")
    assert os.listdir(tmp_path) == ["a.png"]  # noqa: PTH208


async def test_an_answer_never_goes_through_a_link_and_takes_the_place_of_files_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("shot.png.part", "shot.png"):
        (tmp_path / name).symlink_to(precious)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    async with serving() as server:
        web(server, guests(b"\x89PNG", "image/png"))
        for name in ("shot.png", "pipe", "x" * 255):
            done = await volar(server, "call", "demo", "shot", "-o", str(tmp_path / name))
            assert done.code == 0, done.err
        nowhere = await volar(server, "call", "demo", "shot", "-o", str(tmp_path / "none" / "a"))
        assert (nowhere.code, "can't be written: No such file" in nowhere.err) == (1, True)
    assert (precious.read_text(), (tmp_path / "shot.png").read_bytes()) == ("precious", b"\x89PNG")
    assert os.read(reader, 100) == b"\x89PNG"
    os.close(reader)
    assert sorted(os.listdir(tmp_path)) == ["pipe", "precious", "shot.png", "shot.png.part", "x" * 255]  # noqa: PTH208


async def test_errors_of_the_workload_are_printed_and_those_of_the_daemon_reported() -> None:
    async with serving() as server:
        web(server, guests(b'{"detail": "bad url"}', "application/problem+json", 400))
        theirs = await volar(server, "call", "demo", "shot")
        assert (theirs.code, theirs.out) == (1, b'{"detail": "bad url"}')
        assert "the workload of demo answers shot with the status 400" in theirs.err
        web(server, problem(404, "action-not-found", "no action 'shot'", field="action", hint="there are find"))
        ours = await volar(server, "call", "demo", "shot")
        assert (ours.code, ours.out) == (3, b"")
        assert ours.err.startswith("volar: no action 'shot'")
        assert "there are find" in ours.err


@pytest.mark.parametrize(
    "words",
    [["x"], ["a=1", "-d", "{}"], ["a:={"], ['a:="\udcff"'], ["=x"], ["--type", "x/y"]],
    ids=lambda words: ascii(" ".join(words)),
)
async def test_wrong_usage_sends_no_request(words: list[str]) -> None:
    async with serving() as server:
        done = await volar(server, "call", "demo", "shot", *words)
    assert done.code == 2
    assert not server.requests


async def test_a_missing_file_is_named() -> None:
    async with serving() as server:
        done = await volar(server, "call", "demo", "shot", "-d", "@/nonexistent")
    assert done.code == 1
    assert "/nonexistent" in done.err


@pytest.mark.parametrize(
    ("kind", "body", "code", "shown"),
    [
        ("image/png", b"\x89PNG\x1b[2J", 1, b""),
        ("text/plain", b"one\n\x1b[2J", 0, b"one\r\n\\x1b[2J\r\n"),
        ("application/json", b"{}", 0, b"{}\r\n"),
    ],
)
async def test_terminals_get_text_without_control_characters(kind: str, body: bytes, code: int, shown: bytes) -> None:
    async with serving() as server:
        web(server, guests(body, kind))
        environ = ENVIRONMENT | {"VOLANT_API_BASE": server.base_url, "NO_COLOR": "1"}
        master, slave = pty.openpty()
        try:
            with trio.fail_after(20):
                done = await trio.run_process(
                    command("call", "demo", "shot"),
                    stdout=slave, capture_stderr=True, check=False, env=environ, cwd=ROOT,
                )  # fmt: skip
            os.write(slave, b"!")
            text = b""
            while not text.endswith(b"!"):
                text += os.read(master, 65536)
        finally:
            os.close(slave)
            os.close(master)
    assert done.returncode == code
    assert text == shown + b"!"
    assert (b"--output" in done.stderr) == (code == 1)


async def test_a_plugin_is_shown_with_its_actions() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/plugins/web"] = answer(PLUGIN)
        server.routes["GET /api/v1/plugins/web/manifest"] = answer(MANIFEST)
        shown = (await volar(server, "plugins", "get", "web")).out.decode()
        manifest = (await volar(server, "plugins", "get", "web", "--json")).out
    assert "serve 'a b'" in shown
    (row,) = [line for line in shown.splitlines() if line.startswith("shot")]
    assert row.split() == ["shot", "POST", "/shot", "url*,", "full", "Take", "a", "picture"]
    assert json.loads(manifest) == MANIFEST


async def test_a_plugin_is_disabled_and_enabled() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/plugins/web/enabled"] = [answer({**PLUGIN, "enabled": False}), answer(PLUGIN)]
        assert (await volar(server, "plugins", "disable", "web")).out == b"web is disabled\n"
        assert (await volar(server, "plugins", "enable", "web")).out == b"web is enabled\n"
    assert [request.json() for request in server.requests] == [{"enabled": False}, {"enabled": True}]


async def test_a_refused_manifest_is_reported_with_its_field(tmp_path: Path) -> None:
    file = tmp_path / "web.json"
    file.write_text(json.dumps(MANIFEST))
    async with serving() as server:
        server.routes["POST /api/v1/plugins"] = problem(400, "invalid-request", "no", field="actions.shot.path")
        done = await volar(server, "plugins", "install", str(file))
    assert done.code == 1
    assert "actions.shot.path" in done.err
    assert server.requests[0].json() == MANIFEST


def test_a_link_is_replaced_and_what_it_names_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "else").write_bytes(b"else")
    link = tmp_path / "link"
    link.symlink_to("else")
    with download(link, 0o600) as file:
        file.write(b"new")
    assert (link.is_symlink(), link.read_bytes(), (tmp_path / "else").read_bytes()) == (False, b"new", b"else")


def test_what_standard_output_stands_for_is_written_to(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "redirected", os.O_WRONLY | os.O_CREAT)
    try:
        # As /dev/stdout is one. What can be removed there is removed as root.
        link = Path(f"/proc/self/fd/{fd}")
        with download(link, 0o600) as file:
            file.write(b"content")
        assert link.is_symlink()
    finally:
        os.close(fd)
    assert (tmp_path / "redirected").read_bytes() == b"content"


@pytest.mark.skipif(os.getuid() != 0, reason="only root may make a link in /dev")
def test_a_link_in_dev_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "redirected").write_bytes(b"")
    link = Path("/dev") / f"volar-test-{os.getpid()}"
    link.symlink_to(tmp_path / "redirected")
    try:
        with download(link, 0o600) as file:
            file.write(b"content")
        assert link.is_symlink()
    finally:
        link.unlink()
    assert (tmp_path / "redirected").read_bytes() == b"content"
