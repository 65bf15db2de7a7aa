"""`volar run` is the program of an image: its bytes, exit code and signals; and of its VM no more stays than wanted."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, TextMessage

from tests.client.kit import Handler, Request, Server, answer, problem, serving, vm

from .kit import ENVIRONMENT, at_terminal, command, running, volar
from .test_images import DIGEST, image_view

IMAGE = {"reference": "example/tool:1", "digest": DIGEST, "command": ["/bin/tool", "x"]}
CREATED = vm(name="demo", status="pending", image=IMAGE)
RUNS = vm(name="demo", image=IMAGE)
STOPPED = vm(name="demo", status="stopped", image=IMAGE)


class Program:
    """A program in a guest, as the daemon passes it on."""

    def __init__(
        self, *output: tuple[int, bytes], end: dict[str, Any] | None, on_signal: dict[int, dict[str, Any]]
    ) -> None:
        self.output = output
        self.end = end
        """How it ends when its input has; None: it ends by a signal."""
        self.on_signal = on_signal
        self.ends_with = b""
        """Input after which it exits with 9."""
        self.start: dict[str, Any] = {}
        self.input = b""
        self.signals: list[int] = []
        self.attached: list[str | None] = []
        """The ids that clients have attached to again."""
        self.breaks = 0
        """How often the connection breaks after the output."""
        self.left = trio.Event()

    async def __call__(self, request: Request, stream: trio.abc.Stream) -> None:
        socket = WSConnection(ConnectionType.SERVER)
        again = request.param("attach")
        socket.receive_data(request.head)
        list(socket.events())
        await stream.send_all(socket.send(AcceptConnection()))
        if again is not None:
            self.attached.append(again)
            await self._begin(socket, stream, int(request.param("from") or 0))
            if self.breaks:
                self.breaks -= 1
                return
        try:
            while True:
                data = await stream.receive_some()
                if not data:
                    return
                socket.receive_data(bytes(data))
                for event in socket.events():
                    if isinstance(event, CloseConnection):
                        return
                    end = await self._take(event, socket, stream)
                    if self.start and self.breaks:
                        self.breaks -= 1
                        return
                    if end is not None:
                        await stream.send_all(socket.send(TextMessage(json.dumps(end))))
                        await stream.send_all(socket.send(CloseConnection(1000)))
                        return
        finally:
            self.left.set()

    async def _take(self, event: object, socket: WSConnection, stream: trio.abc.Stream) -> dict[str, Any] | None:
        if isinstance(event, BytesMessage):
            self.input += bytes(event.data)[1:]
            if self.ends_with and self.input.endswith(self.ends_with):
                return {"exit_code": 9}
            return self.end if len(event.data) == 1 else None
        if not isinstance(event, TextMessage):
            return None
        message = json.loads(event.data)
        if "tty" in message:
            self.start = message
            await self._begin(socket, stream, 0)
        if "signal" in message:
            self.signals.append(message["signal"])
            return self.on_signal.get(message["signal"])
        return None

    async def _begin(self, socket: WSConnection, stream: trio.abc.Stream, position: int) -> None:
        hello = {"id": "workload", "tty": self.start["tty"], "position": position}
        await stream.send_all(socket.send(TextMessage(json.dumps(hello))))
        for channel, data in self.output if not position else ():
            await stream.send_all(socket.send(BytesMessage(bytes([channel]) + data)))


def program(*output: tuple[int, bytes], end: dict[str, Any] | None = None, on_signal: Any = None) -> Program:
    return Program(*output, end=end, on_signal=on_signal or {})


def prepare(server: Server, of: Handler) -> None:
    """Lets the server make a VM that runs `of`."""

    async def shown(request: Request, stream: trio.abc.Stream) -> None:
        wanted = request.param("wait") or ""
        if "stopped" in wanted:
            await answer(STOPPED, Volant_Wait="met")(request, stream)
        elif "deleted" in wanted:
            await problem(404, "vm-not-found", "there is no VM named 'demo'")(request, stream)
        else:
            await answer(RUNS, Volant_Wait="met")(request, stream)

    server.routes |= {
        "POST /api/v1/vms": answer(CREATED, 201),
        "GET /api/v1/vms/demo": shown,
        "GET /api/v1/images/pulls": answer([]),
        "GET /api/v1/vms/demo/agent/v1/exec": of,
        "DELETE /api/v1/vms/demo": answer(None, 204),
        "POST /api/v1/vms/demo/stop": answer(vm(name="demo", status="stopping")),
    }


def sent(server: Server, method: str) -> list[str]:
    return [request.path for request in server.requests if request.method == method]


def body(server: Server) -> Any:
    (created,) = [request for request in server.requests if (request.method, request.path) == ("POST", "/api/v1/vms")]
    return created.json()


def last_wait(server: Server) -> str | None:
    """The states that were waited for last."""
    return [request.param("wait") for request in server.asked("/api/v1/vms/demo")][-1]


async def test_the_program_runs_like_a_command_of_this_host() -> None:
    tool = program((1, b"out\0"), (2, b"\xff"), end={"exit_code": 7})
    async with serving() as server:
        prepare(server, tool)
        words = ("--name", "demo", "-e", "A=b", "-m", "1G", "--cpus", "2", "-l", "x=y", "-w", "/w", "-u", "app")
        done = await volar(server, "run", *words, "example/tool:1", "--flag", "-t", "last")
    assert (done.code, done.out, done.err) == (7, b"out\0", "\\xff")
    assert body(server) == {
        "name": "demo", "image": "example/tool:1", "command": ["--flag", "-t", "last"], "attach": True,
        "env": {"A": "b"}, "memory_mb": 1024, "cpu_cores": 2, "labels": {"x": "y"}, "workdir": "/w", "user": "app",
    }  # fmt: skip
    assert tool.start == {"env": {}, "tty": False, "rows": 24, "cols": 80}
    # The daemon stops the VM when its workload has ended.
    assert sent(server, "POST") == ["/api/v1/vms"]
    assert not sent(server, "DELETE")
    assert last_wait(server) == "crashed,deleted,stopped"


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"exit_code": 0}, 0),
        ({"signal": 9}, 137),
        ({"error": "no such file", "code": "not_found"}, 127),
        ({"error": "no", "code": "not_executable"}, 126),
    ],
)
async def test_the_exit_code_is_the_programs_and_with_rm_the_daemon_deletes_the_vm(
    end: dict[str, Any], code: int
) -> None:
    async with serving() as server:
        prepare(server, program(end=end))
        done = await volar(server, "run", "--rm", "example/tool:1")
    assert done.code == code
    assert body(server)["on_exit"] == "delete"
    assert last_wait(server) == "crashed,deleted"
    assert not sent(server, "DELETE")
    assert sent(server, "POST") == ["/api/v1/vms"]


async def test_without_a_name_two_words_are_it_and_a_taken_one_is_replaced() -> None:
    async with serving() as server:
        prepare(server, program(end={"exit_code": 0}))
        server.routes["POST /api/v1/vms"] = [problem(409, "name-taken", "taken"), answer(CREATED, 201)]
        assert (await volar(server, "run", "example/tool:1")).code == 0
        first, second = (request.json()["name"] for request in server.asked("/api/v1/vms"))
        server.routes["POST /api/v1/vms"] = problem(409, "name-taken", "there is a VM named 'web' already", vm="web")
        named = await volar(server, "run", "--rm", "--name", "web", "example/tool:1")
    assert first != second
    assert all(len(name.split("-")) == 2 and name.replace("-", "").isalpha() for name in (first, second))
    assert named.code == 125
    assert "there is a VM named 'web' already" in named.err
    # The other VM of that name is not ours to delete.
    assert not sent(server, "DELETE")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], {}),
        (["--entrypoint", "/bin/sh"], {"entrypoint": ["/bin/sh"]}),
        (["--entrypoint", ""], {"entrypoint": []}),
        (["-P"], {"publish_all": True}),
        (["-p", "8080:80", "-v", "data:/var/lib"], {"ports": ["8080:80"], "volumes": ["data:/var/lib"]}),
        (["--disk", "1G", "--network", "none"], {"disk_mb": 1024, "network": "none"}),
        (["--rm"], {"on_exit": "delete"}),
    ],
)
async def test_in_the_background_the_workload_starts_with_the_vm(words: list[str], wanted: dict[str, Any]) -> None:
    async with serving() as server:
        prepare(server, program())
        done = await volar(server, "run", "-d", "--name", "demo", *words, "example/tool:1")
    assert (done.code, done.out) == (0, b"demo\n")
    assert body(server) == {"name": "demo", "image": "example/tool:1", **wanted}
    assert not sent(server, "DELETE")


async def test_input_is_passed_on_only_with_i(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"lines\n")
    for option, expected in ((["-i"], b"lines\n"), ([], b"")):
        tool = program(end={"exit_code": 0})
        async with serving() as server:
            prepare(server, tool)
            with (tmp_path / "input").open("rb") as given, trio.fail_after(20):
                done = await trio.run_process(
                    command("run", *option, "example/tool:1"), stdin=given.fileno(), capture_stdout=True,
                    capture_stderr=True, check=False, env=ENVIRONMENT | {"VOLANT_API_BASE": server.base_url},
                )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert tool.input == expected


async def test_with_a_terminal_keys_are_the_programs_and_the_terminal_is_given_back() -> None:
    tool = program((1, b"ready\r\n"), on_signal={})
    tool.ends_with = b"\x03"
    async with serving() as server:
        prepare(server, tool)
        async with at_terminal(server.base_url, "run", "-it", "--rm", "example/tool:1", rows=33, columns=99) as at:
            await at.expect(b"ready")
            assert not at.is_as_before()
            at.type(b"ls\r\x03")
            assert await at.end() == 9
            assert at.is_as_before()
    assert tool.input == b"ls\r\x03"
    assert tool.start == {"env": {"TERM": "xterm-test"}, "tty": True, "rows": 33, "cols": 99}
    assert not sent(server, "DELETE")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
async def test_signals_are_the_programs(number: int) -> None:
    tool = program((1, b"up"), on_signal={number: {"exit_code": 3}})
    async with serving() as server:
        prepare(server, tool)
        async with running(server, ["run", "-i", "--rm", "example/tool:1"]) as process:
            await until_shown(process, b"up")
            process.send_signal(number)
            assert await process.wait() == 3
    assert tool.signals == [number]
    assert not sent(server, "DELETE")


async def test_a_program_that_ignores_ctrl_c_is_ended_by_the_third() -> None:
    tool = program((1, b"up"))
    async with serving() as server:
        prepare(server, tool)
        async with running(server, ["run", "-i", "--rm", "example/tool:1"]) as process:
            await until_shown(process, b"up")
            for count in range(1, 4):
                process.send_signal(signal.SIGINT)
                if count < 3:
                    await until_signals(tool, count)
            assert await process.wait() == 130
            await tool.left.wait()
    assert sent(server, "DELETE") == ["/api/v1/vms/demo"]


async def test_a_program_outlives_the_daemon_and_volar_attaches_to_it_again() -> None:
    tool = program((1, b"out"), end={"exit_code": 4})
    tool.breaks = 2
    async with serving() as server:
        prepare(server, tool)
        done = await volar(server, "run", "-i", "--rm", "example/tool:1")
    assert (done.code, done.out, done.err) == (4, b"out", "")
    assert tool.attached == ["workload", "workload"]
    assert not sent(server, "DELETE")


async def test_a_program_that_another_client_has_taken_is_left_alone() -> None:
    async def taken(request: Request, stream: trio.abc.Stream) -> None:
        socket = WSConnection(ConnectionType.SERVER)
        socket.receive_data(request.head)
        list(socket.events())
        await stream.send_all(socket.send(AcceptConnection()))
        await stream.receive_some()
        await stream.send_all(socket.send(TextMessage('{"id":"workload","tty":false,"position":0}')))
        await stream.send_all(socket.send(CloseConnection(4000, "another client has attached")))
        while await stream.receive_some():
            pass

    async with serving() as server:
        prepare(server, program())
        server.routes["GET /api/v1/vms/demo/agent/v1/exec"] = taken
        done = await volar(server, "run", "-i", "--rm", "example/tool:1")
    assert done.code == 125
    assert "another client has attached" in done.err
    assert not sent(server, "DELETE")
    assert sent(server, "POST") == ["/api/v1/vms"]


async def test_a_vm_that_the_daemon_does_not_delete_is_deleted() -> None:
    crashed = vm(name="demo", status="crashed", image=IMAGE)
    async with serving() as server:
        prepare(server, program(end={"exit_code": 0}))
        server.routes["GET /api/v1/vms/demo"] = [answer(RUNS, Volant_Wait="met"), answer(crashed, Volant_Wait="met")]
        done = await volar(server, "run", "--rm", "example/tool:1")
    assert done.code == 0
    assert sent(server, "DELETE") == ["/api/v1/vms/demo"]


async def test_in_the_background_a_program_may_have_ended_already() -> None:
    workload = {"state": "failed", "exit_code": 3}
    async with serving() as server:
        prepare(server, program())
        ended = {**STOPPED, "workload": workload}
        server.routes["GET /api/v1/vms/demo"] = answer(ended, Volant_Wait="failed")
        done = await volar(server, "run", "-d", "--name", "demo", "example/tool:1")
        ended["workload"] = {"state": "failed", "error": "there is no program x"}
        missing = await volar(server, "run", "-d", "--name", "demo", "example/tool:1")
    assert (done.code, done.out) == (0, b"demo\n")
    assert missing.code == 125


async def until_shown(process: trio.Process, text: bytes) -> None:
    """Waits until volar has passed this output on."""
    assert process.stdout is not None
    assert await process.stdout.receive_some(len(text)) == text


async def until_signals(tool: Program, count: int) -> None:
    """Waits until the program has got so many signals."""
    while len(tool.signals) < count:  # noqa: ASYNC110
        await trio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["POST /api/v1/vms", "GET /api/v1/vms/demo"])
async def test_an_interrupted_start_leaves_no_vm(number: int, moment: str) -> None:
    asked, go_on = trio.Event(), trio.Event()

    async with serving() as server:
        prepare(server, program())
        following = server.routes[moment]
        assert not isinstance(following, list)

        async def slow(request: Request, stream: trio.abc.Stream) -> None:
            asked.set()
            await go_on.wait()
            await following(request, stream)

        server.routes[moment] = slow
        async with running(server, ["run", "--rm", "example/tool:1"]) as process:
            await asked.wait()
            process.send_signal(number)
            go_on.set()
            assert await process.wait() == 128 + number
    assert sent(server, "DELETE") == ["/api/v1/vms/demo"]


async def test_the_complete_form_takes_an_image_too() -> None:
    async with serving() as server:
        prepare(server, program())
        words = ("demo", "--image", "example/tool:1", "-u", "app", "--no-start", "--no-healthcheck", "-e", "A=b")
        done = await volar(server, "vms", "create", *words, "--", "tool", "--flag")
        wrong = [
            await volar(server, "vms", "create", "demo", "--workdir", "/w"),
            await volar(server, "vms", "create", "demo", "tool"),
            await volar(server, "vms", "create", "demo", "--image", "x", "--plugin", "base"),
            await volar(server, "vms", "create", "demo", "--image", "x", "--from-snapshot", "warm"),
        ]
    assert (done.code, done.out) == (0, b"demo is created\n")
    assert body(server) == {
        "name": "demo", "image": "example/tool:1", "user": "app", "start_workload": False, "health_check": "none",
        "env": {"A": "b"}, "command": ["tool", "--flag"],
    }  # fmt: skip
    assert [each.code for each in wrong] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-dit"], "-i and -t do not work with -d"),
        (["-it"], "-t with -i needs a terminal"),
        (["--restart", "always"], "--restart needs -d"),
        (["--env-file", "/nonexistent"], "can't be read"),
        (["--authfile", "/nonexistent"], "can't be read"),
        (["--memory", "lots"], "is no size"),
    ],
)
async def test_wrong_usage_is_125_and_makes_no_vm(words: list[str], text: str) -> None:
    async with serving() as server:
        done = await volar(server, "run", *words, "example/tool:1")
    assert done.code == 125
    assert text in done.err
    assert not server.requests


UNREACHABLE = problem(503, "registry-unreachable", "no registry answers", hint="check the network", field="image")


@pytest.mark.parametrize(
    ("image", "images", "says"),
    [
        ("python", [], "`volar images build python` builds an image of python that needs no registry"),
        ("python", ["localhost/python:3.13"], "`volar run localhost/python:3.13` runs an image of python"),
        # Who asks for a version wants that one.
        ("python:2.7", [], "check the network"),
        ("example/tool:1", [], "check the network"),
    ],
)
async def test_without_a_registry_a_stock_image_is_named(image: str, images: list[str], says: str) -> None:
    async with serving() as server:
        prepare(server, program())
        server.routes["POST /api/v1/vms"] = UNREACHABLE
        server.routes["GET /api/v1/images"] = answer([image_view(references=images)] if images else [])
        done = await volar(server, "run", "--rm", image)
        document = await volar(server, "run", "--rm", "--json", image)
    assert done.code == 125
    assert done.err.startswith("volar: no registry answers")
    assert says in done.err
    assert json.loads(document.err)["error"]["code"] == "registry-unreachable"
    assert len(sent(server, "POST")) == 2


@pytest.mark.parametrize(("key", "code", "asked"), [(b"\r", 9, 2), (b"n\r", 125, 1)])
async def test_on_a_terminal_the_stock_image_that_was_built_is_offered(key: bytes, code: int, asked: int) -> None:
    tool = program((1, b"ready\r\n"), on_signal={})
    tool.ends_with = b"\x03"
    async with serving() as server:
        prepare(server, tool)
        server.routes["POST /api/v1/vms"] = [UNREACHABLE, answer(CREATED, 201)]
        server.routes["GET /api/v1/images"] = answer([image_view(references=["localhost/debian:13"])])
        async with at_terminal(server.base_url, "run", "-it", "--rm", "debian") as at:
            await at.expect(rb"Run localhost/debian:13.*\[Y/n\]")
            at.type(key)
            if code == 9:
                await at.expect(b"ready")
                at.type(b"\x03")
            assert await at.end() == code
    made = [request.json()["image"] for request in server.asked("/api/v1/vms") if request.method == "POST"]
    assert made == ["debian", "localhost/debian:13"][:asked]


async def test_a_vm_that_does_not_start_is_reported_and_deleted() -> None:
    reason = {"code": "boot_timeout", "message": "the agent did not answer", "console": ["last words"]}
    async with serving() as server:
        prepare(server, program())
        crashed = vm(name="demo", status="crashed", image=IMAGE, reason=reason)
        server.routes["GET /api/v1/vms/demo"] = answer(crashed, Volant_Wait="failed")
        done = await volar(server, "run", "--rm", "example/tool:1")
    assert done.code == 125
    assert "VM 'demo' is crashed: the agent did not answer" in done.err
    assert "last words" in done.err
    assert sent(server, "DELETE") == ["/api/v1/vms/demo"]


async def test_pull_always_asks_the_registry_and_never_does_not() -> None:
    async with serving() as server:
        prepare(server, program(end={"exit_code": 0}))
        server.routes["POST /api/v1/images/pull"] = answer(image_view())
        server.routes["GET /api/v1/images"] = answer([])
        always = await volar(server, "run", "--pull", "always", "example/tool:1")
        never = await volar(server, "run", "--pull", "never", "example/tool:1")
    assert always.code == 0, always.err
    (pull,) = server.asked("/api/v1/images/pull")
    assert pull.json() == {"reference": "example/tool:1", "refresh": True}
    assert never.code == 125
    assert "is not in the cache, and --pull is never" in never.err


@pytest.mark.parametrize("is_terminal", [False, True])
async def test_a_fetch_is_mentioned_once_and_has_a_bar_on_a_terminal(is_terminal: bool) -> None:
    asked = trio.Event()

    async def pulls(request: Request, stream: trio.abc.Stream) -> None:
        pull = {
            "reference": "example/tool:1", "digest": DIGEST, "phase": "fetching", "layers_done": 1, "layers_total": 3,
            "done_bytes": 5 * 2**20, "total_bytes": 10 * 2**20, "bytes_per_s": 1.0, "waiting": 1,
        }  # fmt: skip
        await answer([pull])(request, stream)
        if len(server.asked("/api/v1/images/pulls")) > 2:
            asked.set()

    async def slow(request: Request, stream: trio.abc.Stream) -> None:
        await asked.wait()
        await answer(RUNS, Volant_Wait="met")(request, stream)

    async with serving() as server:
        prepare(server, program(end={"exit_code": 0}))
        server.routes |= {"GET /api/v1/images/pulls": pulls, "GET /api/v1/vms/demo": slow}
        if is_terminal:
            async with at_terminal(server.base_url, "run", "example/tool:1") as at:
                await at.expect(rb"Fetching example/tool:1, layer 2 of 3 .*5\.0/10\.0 MiB")
                assert await at.end() == 0
        else:
            done = await volar(server, "run", "example/tool:1")
            assert (done.code, done.err) == (0, "volar: fetching example/tool:1\n")
