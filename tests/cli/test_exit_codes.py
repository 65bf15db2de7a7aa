"""A script can tell from the exit code what happened, and a person from the message what to do."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import stat
from base64 import b64encode
from pathlib import Path

import pytest
import trio

from tests.client.kit import Handler, Request, answer, event, problem, send_head, serving, sse, vm
from volant.cli._output import as_json
from volant.cli._text import safe

from .kit import running, volar


@pytest.mark.parametrize(
    ("status", "code"), [(400, 1), (401, 1), (404, 3), (409, 4), (412, 4), (500, 1), (502, 1), (503, 1)]
)
async def test_problems_have_their_exit_codes(status: int, code: int) -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms/demo"] = problem(
            status, "some-code", "what is wrong", hint="what to do", field="cpu_cores", request_id="r7"
        )
        done = await volar(server, "vms", "get", "demo")
    assert done.code == code
    assert done.out == b""
    assert done.err.startswith("volar: what is wrong (cpu_cores)\n  what to do\n")
    assert ("r7" in done.err) == (status >= 500)


async def test_errors_are_json_with_json() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms/demo"] = problem(404, "vm-not-found", "no VM", hint="list", vm="demo")
        done = await volar(server, "--json", "vms", "get", "demo")
    assert done.code == 3
    assert done.out == b""
    assert json.loads(done.err) == {
        "error": {
            "status": 404,
            "code": "vm-not-found",
            "detail": "no VM",
            "hint": "list",
            "vm": "demo",
            "exit_code": 3,
        }
    }


async def test_an_unreachable_daemon_is_5() -> None:
    done = await volar(None, "--api", "http://127.0.0.1:1", "vms", "list")
    assert done.code == 5
    assert "http://127.0.0.1:1" in done.err
    assert "volantd" in done.err


@pytest.mark.parametrize(
    "words",
    [
        ["vms", "create"],
        ["vms", "create", "demo", "--cpu", "0"],
        ["vms", "create", "demo", "--env", "=X"],
        ["vms", "create", "demo", "--timeout", "soon"],
        ["vms", "wait", "demo", "--for", "running,foo"],
        ["vms", "logs", "demo", "--tail", "1", "--since", "2"],
        ["--api", "nonsense://", "vms", "list"],
        ["nonsense"],
    ],
)
async def test_wrong_usage_is_2(words: list[str]) -> None:
    done = await volar(None, *words)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "Usage" in done.err or "Error" in done.err


@pytest.mark.parametrize("group", [[], ["vms"]])
@pytest.mark.parametrize(
    "words",
    [
        ["demo"],
        ["demo", "--json", "--", "true"],
        ["--nonsense", "demo", "x"],
        ["-e", "=", "demo", "x"],
        ["-it", "d", "x"],
    ],
)
async def test_wrong_usage_of_exec_is_125_as_2_may_be_the_commands_own(group: list[str], words: list[str]) -> None:
    done = await volar(None, *group, "exec", *words)
    assert done.code == 125
    assert "Usage" in done.err or "Error" in done.err


async def test_failures_of_volar_and_of_the_daemon_are_125_for_exec() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms/demo/agent/v1/exec"] = problem(404, "vm-not-found", "no VM")
        missing = await volar(server, "exec", "demo", "true")
        as_json = await volar(server, "exec", "--json", "demo", "true")
    unreachable = await volar(None, "--api", "http://127.0.0.1:1", "exec", "demo", "true")
    assert (missing.code, unreachable.code) == (125, 125)
    assert json.loads(as_json.err)["error"]["exit_code"] == as_json.code == 125


async def test_the_exit_code_of_a_wait_is_its_outcome() -> None:
    crashed = vm(status="crashed", reason={"code": "guest_panicked", "message": "the kernel panicked", "console": []})
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([], Volant_Event_Id="e-1")
        server.routes["GET /api/v1/events/vms"] = sse(event(2, "VM_STARTING", "starting"), event(3), stay=True)
        server.routes["POST /api/v1/vms"] = answer(vm(status="pending"), 201)
        server.routes["GET /api/v1/vms/demo"] = answer(vm(), Volant_Wait="met")
        met = await volar(server, "vms", "create", "demo", "--wait", "--label", "a=b", "--memory", "512")
        server.routes["GET /api/v1/vms/demo"] = answer(crashed, Volant_Wait="failed")
        failed = await volar(server, "vms", "wait", "demo", "--timeout", "1s")
        server.routes["GET /api/v1/vms/demo"] = answer(vm(status="starting"), Volant_Wait="timeout")
        late = await volar(server, "vms", "wait", "demo", "--timeout", "10ms", "--json")
    assert (met.code, met.out) == (0, b"demo is running\n")
    assert re.search("VM_STARTING +demo  message 2", met.err)
    assert "VM_RUNNING" in met.err
    body = next(request for request in server.requests if request.method == "POST").json()
    assert (body["memory_mb"], body["labels"]) == (512, {"a": "b"})
    assert failed.code == 1
    assert "the kernel panicked" in failed.err
    assert late.code == 124
    assert json.loads(late.out)["status"] == "starting"


async def test_the_size_of_a_vm_is_sent_only_if_it_is_given() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms"] = answer(vm(status="pending"), 201)
        for flags in ([], ["--memory", "2048"], ["--cpu", "1", "--memory", "4096"]):
            done = await volar(server, "vms", "create", "demo", "--plugin", "browser", *flags)
            assert done.code == 0, done.err
        assert (await volar(server, "vms", "create", "demo")).code == 0
    bodies = [request.json() for request in server.requests if request.method == "POST"]
    sizes = [(body.get("cpu_cores"), body.get("memory_mb")) for body in bodies]
    assert sizes == [(None, None), (None, 2048), (1, 4096), (None, None)]


async def test_an_interrupt_is_130_without_a_message() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/events/vms"] = sse(event(1), stay=True)
        async with running(server, ["vms", "watch", "--since", "0", "--json"]) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            line = await process.stdout.receive_some()
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert await process.stderr.receive_some() == b""
    assert json.loads(line)["id"] == "e-1"


async def test_a_pipe_without_a_reader_ends_volar_without_a_message() -> None:
    async with serving() as server:

        async def flood(request: Request, stream: trio.abc.Stream) -> None:
            await sse()(request, stream)
            for seq in range(1_000_000):
                await stream.send_all(event(seq).encode() + b"\n\n")

        server.routes["GET /api/v1/events/vms"] = flood
        async with running(server, ["vms", "watch", "--since", "0"]) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            await process.stdout.receive_some(10)
            await process.stdout.aclose()
            assert await process.wait() == 141
            assert await process.stderr.receive_some() == b""


def test_output_of_a_guest_does_not_control_the_terminal() -> None:
    assert safe("a\x1b]0;x\x07\x9b2J\u202eb\tc\nd") == r"a\x1b]0;x\x07\x9b2J\x202eb" + "\tc" + r"\x0ad"


async def test_an_unknown_state_is_an_error_with_the_option_and_the_states() -> None:
    done = await volar(None, "vms", "wait", "demo", "--for", "foo")
    assert "Invalid value for '--for': 'foo' is not a state to wait for; use one of pending, starting, " in done.err
    assert "deleted" in done.err


async def test_a_warning_of_a_create_is_printed_beside_the_answer() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms"] = answer(vm(warnings=["the network is 'user': no bridge"]), 201)
        done = await volar(server, "vms", "create", "demo")
    assert (done.code, done.out) == (0, b"demo is created\n")
    assert done.err == "volar: warning: the network is 'user': no bridge\n"


async def test_starting_a_running_vm_prints_that_it_runs() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms/demo/start"] = [answer(vm()), answer(vm(status="stopped"))]
        runs = await volar(server, "vms", "start", "demo")
        starts = await volar(server, "vms", "start", "demo")
    assert (runs.out, starts.out) == (b"demo is running\n", b"demo is starting\n")


async def test_the_name_of_a_file_may_be_any_bytes(tmp_path: Path) -> None:
    name = f"{tmp_path}/a\udcff"
    for words in (("call", "demo", "act", "--data", f"@{name}"), ("system", "backup", f"{name}/x")):
        async with serving() as server:
            server.routes["POST /api/v1/system/backup"] = problem(409, "backup-under-way", f"not {tmp_path}")
            done = await volar(server, "--json", *words)
        assert done.code != 0
        assert json.loads(done.err)["error"]["detail"]
    assert json.loads(as_json({"path": name})) == {"path": name}
    assert json.loads(as_json({"b": name, "a": 1}, is_sorted=True)) == {"a": 1, "b": name}


def backup_of(content: bytes) -> Handler:
    """A route that answers with a backup."""

    async def handler(request: Request, stream: trio.abc.Stream) -> None:
        del request
        sha256 = b64encode(hashlib.sha256(content).digest()).decode()
        await send_head(
            stream, 200, Content_Length=str(len(content)), Repr_Digest=f"sha-256=:{sha256}:",
            Content_Disposition='attachment; filename="volant-1.db"',
        )  # fmt: skip
        await stream.send_all(content)

    return handler


async def test_a_backup_can_be_written_to_a_pipe() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/system/backup"] = backup_of(b"a database")
        done = await volar(server, "system", "backup", "/dev/stdout")
    assert (done.code, done.out) == (0, b"a database"), done.err
    assert "10 bytes" in done.err


async def test_a_backup_is_for_this_user_alone_and_overwrites_a_file_only_with_force(tmp_path: Path) -> None:
    kept = tmp_path / "kept.db"
    async with serving() as server:
        server.routes["POST /api/v1/system/backup"] = [backup_of(content) for content in (b"one", b"two", b"three")]
        taken = await volar(server, "system", "backup", str(kept), "--json")
        assert (taken.code, json.loads(taken.out)) == (0, {"path": str(kept), "bytes": 3}), taken.err
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        kept.chmod(0o644)
        refused = await volar(server, "system", "backup", str(kept))
        assert (refused.code, kept.read_bytes()) == (4, b"one")
        assert f"{kept} exists already" in refused.err
        forced = await volar(server, "system", "backup", str(kept), "--force")
        assert (forced.code, kept.read_bytes()) == (0, b"three"), forced.err
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert [path.name for path in await trio.Path(tmp_path).iterdir()] == ["kept.db"]
