"""Closed, full and broken standard streams: a word and an exit code, never an internal error."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from functools import partial

import pytest
import trio

from tests.client.kit import Server, answer, ndjson, problem, serving, vm

from .kit import ENVIRONMENT, ROOT, command, running

COMMANDS = [
    ["--help"],
    ["--version"],
    ["vms", "list"],
    ["vms", "list", "--json"],
    ["vms", "exec", "demo", "--", "true"],
    ["vms", "delete", "demo"],
    ["mcp"],
]
TRACES = ("Traceback", "Exception ignored", "internal", "volar itself", "Errno")


async def shell(server: Server, words: list[str], redirection: str) -> tuple[int, str, str]:
    """Runs a `volar` under a shell, with a redirection; returns its code, output and errors."""
    env = ENVIRONMENT | {"VOLANT_API_BASE": server.base_url}
    line = f"{shlex.join(command(*words))} {redirection}"
    with trio.fail_after(20):
        done = await trio.run_process(
            ["bash", "-c", line], capture_stdout=True, capture_stderr=True, check=False, env=env, cwd=ROOT
        )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def prepare(server: Server) -> None:
    server.routes["GET /api/v1/vms"] = answer([vm()])
    server.routes["GET /api/v1/vms/demo"] = answer(vm())
    server.routes["DELETE /api/v1/vms/demo"] = answer(None, 204)
    server.routes["POST /api/v1/vms/demo/agent/v1/exec"] = ndjson(
        b'{"stream":"stdout","data":"b3V0Cg=="}\n{"exit_code":0}\n'
    )


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(("redirection", "why"), [(">&-", "it is closed"), (">/dev/full", "No space left on device")])
async def test_output_that_can_not_be_written_is_an_error(words: list[str], redirection: str, why: str) -> None:
    async with serving() as server:
        prepare(server)
        code, _, err = await shell(server, words, redirection)
    detail = f"can't write to standard output: {why}"
    expected = 125 if "exec" in words else 1
    if "--json" in words:
        assert json.loads(err) == {"error": {"code": "output-failed", "detail": detail, "exit_code": expected}}
    else:
        assert err == f"volar: {detail}\n"
    assert code == expected


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
async def test_a_reader_that_has_exited_ends_volar_without_a_message(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    async with serving() as server:
        prepare(server)
        env = ENVIRONMENT | {"VOLANT_API_BASE": server.base_url}
        run = partial(trio.run_process, command(*words), stdout=writing, capture_stderr=True, check=False)
        with trio.fail_after(20):
            done = await run(env=env, cwd=ROOT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&-", "<&- 2>&-"])
async def test_other_streams_change_neither_output_nor_code(redirection: str) -> None:
    async with serving() as server:
        prepare(server)
        assert (await shell(server, ["vms", "list", "--json"], redirection))[0] == 0
        code, out, err = await shell(server, ["vms", "exec", "demo", "--", "true"], redirection)
        assert (code, out, err) == (0, "out\n", "")
        server.routes["GET /api/v1/vms/demo"] = problem(404, "vm-not-found", "no VM")
        assert (await shell(server, ["vms", "get", "demo"], redirection))[0] == 3
        assert (await shell(server, ["nonsense"], redirection))[0] == 2
        assert (await shell(server, ["mcp"], redirection))[0] == 0


async def test_with_all_streams_closed_volar_fails_without_a_message() -> None:
    async with serving() as server:
        prepare(server)
        assert await shell(server, ["vms", "list"], "<&- >&- 2>&-") == (1, "", "")


async def test_closed_input_is_empty_input() -> None:
    async with serving() as server:
        code, _, err = await shell(server, ["plugins", "install", "-"], "<&-")
    assert code != 0
    assert not any(trace in err for trace in TRACES)


@pytest.mark.parametrize(
    ("words", "route"),
    [
        (["vms", "list"], "GET /api/v1/vms"),
        (["vms", "delete", "demo"], "DELETE /api/v1/vms/demo"),
        (["vms", "exec", "demo", "--", "true"], "POST /api/v1/vms/demo/agent/v1/exec"),
        (["vms", "cp", "demo:/etc/motd", "-"], "HEAD /api/v1/vms/demo/agent/v1/files/etc/motd"),
    ],
)
async def test_an_interrupt_ends_a_wait_for_the_daemon(words: list[str], route: str) -> None:
    asked = trio.Event()

    async def silent(request: object, stream: trio.abc.Stream) -> None:
        del request, stream
        asked.set()
        await trio.sleep_forever()

    async with serving() as server:
        server.routes[route] = silent
        async with running(server, words) as process:
            await asked.wait()
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert await process.stderr.receive_some() == b""
            assert await process.wait() == 130


def test_an_interrupt_between_a_call_and_its_await_prints_nothing() -> None:
    code = """
from volant.cli._options import Options
from volant.cli._streaming import run

async def wait():
    pass

async def interrupted(session):
    wait()
    raise KeyboardInterrupt

try:
    run(Options(), interrupted)
except KeyboardInterrupt:
    print("interrupted")
"""
    env = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=env, cwd=ROOT, timeout=60)
    assert (done.stdout, done.stderr) == (b"interrupted\n", b"")
