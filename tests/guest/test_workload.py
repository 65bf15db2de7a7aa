"""The workload: started once, watched, checked, restarted by its policy, and stopped at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import Asker, read_until
from tests.guest.test_output import Reader
from tests.ports import free_port
from volant.guest import _workload
from volant.model import agent as wire


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workload, "_FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(_workload, "_STARTING_CHECK_S", 0.05)


def put(agent: Asker, *entrypoint: str, **fields: object) -> Any:
    answer = agent.ask("PUT", wire.DAEMON_WORKLOAD, {"entrypoint": list(entrypoint), **fields})
    assert answer.status == 200, answer.body
    return answer.json()


def printed_by(agent: Asker, *entrypoint: str, **fields: object) -> str:
    """Runs a program as the workload until it has ended with 0; returns what it has printed."""
    put(agent, *entrypoint, restart="never", **fields)
    status = wait_for(agent, lambda status: status["state"] in ("exited", "failed"))
    assert status["state"] == "exited", status
    agent.server.workload.stop(1.0)
    return Reader(agent).read(agent.server.output.statistics()["stdout_bytes"]).decode()


def wait_for(agent: Asker, enough: Callable[[Any], object]) -> Any:
    """Watches the workload until its status is as wanted."""
    sock = agent.open(f"GET {wire.DAEMON_WATCH} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    found: list[Any] = []

    def look(data: bytes) -> bool:
        lines = [line for line in data.partition(b"\r\n\r\n")[2].split(b"\r\n") if line.startswith(b"{")]
        found[:] = [json.loads(line) for line in lines if line.endswith(b"}\n")]
        return any(enough(status) for status in found)

    read_until(sock, look)
    sock.close()
    return next(status for status in found if enough(status))


def test_there_is_no_workload_at_first(agent: Asker) -> None:
    status = agent.ask("GET", wire.HEALTHZ).json()["workload"]
    assert (status["state"], status["pid"], status["restarts"]) == ("none", None, 0)
    assert agent.ask("GET", "/").status == 404


def test_a_workload_without_a_check_is_healthy_while_it_runs(agent: Asker) -> None:
    put(agent, "sleep", "1000")
    status = wait_for(agent, lambda status: status["state"] == "healthy")
    assert status["pid"]
    assert agent.ask("GET", wire.HEALTHZ).json()["workload"]["state"] == "healthy"


def test_environment_directory_and_output_are_the_workloads(agent: Asker, tmp_path: Path) -> None:
    put(agent, "sh", "-c", 'echo "$A $PWD"; echo bad >&2', env={"A": "b"}, workdir=str(tmp_path), restart="never")
    wait_for(agent, lambda status: status["state"] == "exited")
    agent.server.workload.stop(1.0)
    statistics = agent.server.output.statistics()
    assert statistics["stdout_bytes"] == len(f"b {tmp_path}\n")
    assert statistics["stderr_bytes"] == 4


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs as another user")
WHO = 'echo "$(id -u) $(id -g) $HOME"; echo again > /dev/stdout'


@needs_root
@pytest.mark.parametrize(
    ("user", "env", "expected"),
    [
        (None, {}, "0 0 /root"),
        ("nobody", {}, "65534 65534 /nonexistent"),
        ("65534:7", {"HOME": "/srv"}, "65534 7 /srv"),
        ("123456", {}, "123456 0 /"),
    ],
)
def test_it_runs_as_its_user_and_can_open_its_output(
    agent: Asker, user: str | None, env: dict[str, str], expected: str
) -> None:
    fields = {} if user is None else {"user": user}
    assert printed_by(agent, "/bin/sh", "-c", WHO, env=env, **fields) == f"{expected}\nagain\n"


@needs_root
def test_an_unknown_user_is_reported(agent: Asker) -> None:
    put(agent, "true", user="nobody-at-all")
    status = wait_for(agent, lambda status: status["state"] == "failed")
    assert status["error"] == "there is no user nobody-at-all"


def test_a_program_is_found_by_the_path_of_the_workload(agent: Asker, tmp_path: Path) -> None:
    program = tmp_path / "bin/greet"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho hello\n")
    program.chmod(0o755)
    assert printed_by(agent, "greet", env={"PATH": str(program.parent)}) == "hello\n"


def test_a_relative_program_is_one_of_the_working_directory(agent: Asker, tmp_path: Path) -> None:
    program = tmp_path / "bin/greet"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\npwd\n")
    program.chmod(0o755)
    assert printed_by(agent, "./bin/greet", workdir=str(tmp_path)) == f"{tmp_path}\n"


def test_a_missing_working_directory_is_made(agent: Asker, tmp_path: Path) -> None:
    workdir = tmp_path / "a/b"
    assert printed_by(agent, "pwd", workdir=str(workdir)) == f"{workdir}\n"
    assert workdir.stat().st_mode & 0o777 == 0o755


def test_a_working_directory_that_can_not_be_made_is_reported(agent: Asker, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    put(agent, "true", workdir=str(tmp_path / "file/x"), restart="never")
    status = wait_for(agent, lambda status: status["state"] == "failed")
    assert "is not a directory" in status["error"]


def test_a_check_by_command_has_environment_and_directory_of_the_workload(agent: Asker, tmp_path: Path) -> None:
    check = {"command": ["sh", "-c", f'test "$A $PWD" = "b {tmp_path}"'], "interval_s": 0.1, "retries": 50}
    put(agent, "sleep", "1000", env={"A": "b"}, workdir=str(tmp_path), health_check=check)
    wait_for(agent, lambda status: status["state"] == "healthy")


@pytest.mark.parametrize(
    ("policy", "script", "state", "last"),
    [
        ("never", "exit 0", "exited", {"exit_code": 0}),
        ("never", "exit 3", "failed", {"exit_code": 3}),
        ("never", "kill -9 $$", "failed", {"signal": 9}),
        ("on-failure", "exit 0", "exited", {"exit_code": 0}),
    ],
)
def test_the_end_stays_in_the_status(agent: Asker, policy: str, script: str, state: str, last: dict[str, int]) -> None:
    put(agent, "sh", "-c", script, restart=policy)
    status = wait_for(agent, lambda status: status["state"] in ("exited", "failed"))
    assert status["state"] == state
    assert status["pid"] is None
    assert {key: status[key] for key in last} == last


@pytest.mark.parametrize(("policy", "script"), [("on-failure", "exit 3"), ("always", "exit 0")])
def test_the_policy_decides_about_restarts(agent: Asker, policy: str, script: str) -> None:
    put(agent, "sh", "-c", script, restart=policy)
    assert wait_for(agent, lambda status: status["restarts"] >= 3)


def test_a_missing_program_is_reported_as_failed(agent: Asker) -> None:
    put(agent, "no-such-program", restart="always")
    status = wait_for(agent, lambda status: status["state"] == "failed")
    assert "no-such-program" in status["error"]


def test_the_same_workload_is_accepted_again_and_another_refused(agent: Asker) -> None:
    put(agent, "sleep", "1000", env={"A": "1", "B": "2"})
    pid = wait_for(agent, lambda status: status["pid"])["pid"]
    assert put(agent, "sleep", "1000", env={"B": "2", "A": "1"})["pid"] == pid
    assert agent.ask("PUT", wire.DAEMON_WORKLOAD, {"entrypoint": ["sleep", "5"]}).status == 409


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "entrypoint"),
        ({"entrypoint": []}, "entrypoint"),
        ({"entrypoint": ["a"], "port": 0}, "port"),
        ({"entrypoint": ["a"], "port": "80"}, "port"),
        ({"entrypoint": ["a"], "restart": "sometimes"}, "restart"),
        ({"entrypoint": ["a"], "workdir": "x"}, "workdir"),
        ({"entrypoint": ["a"], "user": ""}, "user"),
        ({"entrypoint": ["a"], "user": 0}, "user"),
        ({"entrypoint": ["a"], "stop_signal": "SIGNONE"}, "stop_signal"),
        ({"entrypoint": ["a"], "stop_signal": 15}, "stop_signal"),
        ({"entrypoint": ["a"], "env": {"": "x"}}, "env"),
        ({"entrypoint": ["a"], "health_check": {}}, "health_check"),
        ({"entrypoint": ["a"], "health_check": {"path": "/"}}, "health_check.port"),
        ({"entrypoint": ["a"], "health_check": {"path": "/ HTTP/1.1\r\nX: y", "port": 1}}, "health_check.path"),
        ({"entrypoint": ["a"], "health_check": {"command": ["x"], "retries": 0}}, "health_check.retries"),
        (
            {"entrypoint": ["a"], "health_check": {"command": ["x"], "start_period_s": -1}},
            "health_check.start_period_s",
        ),
        ({"entrypoint": ["a"], "health_check": {"command": ["x"], "y": 0}}, "health_check.y"),
        ({"entrypoint": ["a"], "z": 1}, "z"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(agent: Asker, body: object, field: str) -> None:
    answer = agent.ask("PUT", wire.DAEMON_WORKLOAD, body)
    assert answer.status == 400
    assert answer.json()["field"] == field


def test_a_check_by_command_sets_the_state(agent: Asker, tmp_path: Path) -> None:
    flag = tmp_path / "well"
    check = {"command": ["test", "-e", str(flag)], "interval_s": 0.1, "retries": 2}
    put(agent, "sleep", "1000", health_check=check)
    assert wait_for(agent, lambda status: status["state"] == "unhealthy")["error"]
    flag.touch()
    wait_for(agent, lambda status: status["state"] == "healthy")
    flag.unlink()
    wait_for(agent, lambda status: status["state"] == "unhealthy")


def test_failures_within_the_start_period_do_not_count_before_the_first_success(agent: Asker, tmp_path: Path) -> None:
    runs, ill = tmp_path / "runs", tmp_path / "ill"
    command = ["sh", "-c", f"echo >>{runs}; [ ! -e {ill} ] && [ $(wc -l <{runs}) -gt 9 ]"]
    check = {"command": command, "interval_s": 0.1, "retries": 1, "start_period_s": 600}
    put(agent, "sleep", "1000", health_check=check)
    assert wait_for(agent, lambda status: status["state"] != "starting")["state"] == "healthy"
    ill.touch()
    wait_for(agent, lambda status: status["state"] == "unhealthy")


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/well" else 500)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize(("path", "state"), [("/well", "healthy"), ("/ill", "unhealthy")])
def test_a_check_by_http_sets_the_state(agent: Asker, path: str, state: str) -> None:
    port = free_port()
    check = {"path": path, "interval_s": 1.0, "retries": 2}
    put(agent, sys.executable, "-c", SERVER, str(port), port=port, health_check=check)
    wait_for(agent, lambda status: status["state"] == state)


def test_the_rest_of_a_run_is_killed_before_the_next(agent: Asker, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    put(agent, "sh", "-c", f"sleep 1000 & echo $! >> {pids}; exit 1", restart="on-failure")
    wait_for(agent, lambda status: status["restarts"] >= 2)
    first = pids.read_text().split()[0]
    end = time.monotonic() + 5
    while time.monotonic() < end and Path(f"/proc/{first}/cmdline").exists():
        if not Path(f"/proc/{first}/cmdline").read_bytes():
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{first}").exists()


def test_stopping_sends_sigterm_first(agent: Asker, tmp_path: Path) -> None:
    script = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    put(agent, "sh", "-c", script, restart="always")
    while not agent.server.output.statistics()["stdout_bytes"]:
        time.sleep(0.01)
    agent.server.workload.stop(10.0)
    assert agent.server.output.statistics()["stdout_bytes"] == len("up\nbye\n")
    assert agent.server.workload.status()["state"] == "exited"


@pytest.mark.parametrize("name", ["SIGQUIT", "int", "SIGRTMIN+3", "10"])
def test_another_stop_signal_goes_to_the_program_alone(agent: Asker, name: str) -> None:
    number = wire.signal_number(name)
    # The child would report a signal to the whole group.
    child = f"trap 'echo child' {number}; while :; do sleep 0.05; done"
    script = f"trap 'echo bye; exit 0' {number}; sh -c \"{child}\" & echo up; while :; do sleep 0.05; done"
    put(agent, "bash", "-c", script, restart="always", stop_signal=name)
    while not agent.server.output.statistics()["stdout_bytes"]:
        time.sleep(0.01)
    agent.server.workload.stop(10.0)
    assert Reader(agent).read(agent.server.output.statistics()["stdout_bytes"]) == b"up\nbye\n"


def test_the_session_of_the_workload_is_reported_while_it_runs(agent: Asker) -> None:
    leaders: list[int | None] = []
    agent.server.workload.leader_changed = leaders.append
    put(agent, "sh", "-c", "exit 1", restart="on-failure")
    wait_for(agent, lambda status: status["restarts"] >= 1)
    agent.server.workload.stop(1.0)
    assert leaders[0]
    assert leaders[1::2] == [None] * (len(leaders) // 2)


def test_watchers_do_not_see_the_end_by_a_stop(agent: Asker) -> None:
    put(agent, "sleep", "1000")
    wait_for(agent, lambda status: status["state"] == "healthy")
    sock = agent.open(f"GET {wire.DAEMON_WATCH} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    read_until(sock, lambda data: b"healthy" in data)
    agent.server.workload.stop(5.0)
    assert agent.server.workload.status()["state"] == "exited"
    sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        sock.recv(1)


def test_stopping_kills_after_the_grace_period(agent: Asker) -> None:
    put(agent, "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done", restart="always")
    while not agent.server.output.statistics()["stdout_bytes"]:
        time.sleep(0.01)
    agent.server.workload.stop(0.2)
    assert agent.server.workload.status()["pid"] is None
