"""The workload: started once, watched, checked, restarted by its policy, and stopped at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import Asker, read_until
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
        ({"entrypoint": ["a"], "env": {"": "x"}}, "env"),
        ({"entrypoint": ["a"], "health_check": {}}, "health_check"),
        ({"entrypoint": ["a"], "health_check": {"path": "/"}}, "health_check.port"),
        ({"entrypoint": ["a"], "health_check": {"path": "/ HTTP/1.1\r\nX: y", "port": 1}}, "health_check.path"),
        ({"entrypoint": ["a"], "health_check": {"command": ["x"], "retries": 0}}, "health_check.retries"),
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


def test_stopping_kills_after_the_grace_period(agent: Asker) -> None:
    put(agent, "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done", restart="always")
    while not agent.server.output.statistics()["stdout_bytes"]:
        time.sleep(0.01)
    began = time.monotonic()
    agent.server.workload.stop(0.2)
    assert time.monotonic() - began < 3
    assert agent.server.workload.status()["pid"] is None
