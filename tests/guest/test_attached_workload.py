"""A workload that waits for its first client: that client has its input, terminal and output; the log has that too."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from wsproto.events import BytesMessage, CloseConnection, TextMessage

from tests.guest.conftest import Asker
from tests.guest.test_exec_http import gone
from tests.guest.test_exec_websocket import Talk
from tests.guest.test_output import Reader
from tests.guest.test_workload import put, wait_for
from volant.guest import _workload
from volant.model import agent as wire


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workload, "_FIRST_BACKOFF_S", 0.02)


def sh(agent: Asker, script: str, **fields: object) -> None:
    put(agent, "sh", "-c", script, attach=True, restart="never", **fields)


def attached(agent: Asker, **first: object) -> Talk:
    return Talk(agent, "/v1/exec?workload=true", first)


def ended(agent: Asker) -> Any:
    return wait_for(agent, lambda status: status["state"] in ("exited", "failed"))


def test_it_starts_with_its_client_and_its_output_is_in_the_log_too(agent: Asker) -> None:
    sh(agent, "echo $A $B; cat; echo bad >&2; exit 3", env={"A": "a", "B": "b"})
    before = agent.ask("GET", wire.HEALTHZ).json()["workload"]
    assert (before["state"], before["pid"]) == ("starting", None)
    talk = attached(agent, env={"B": "client"})
    talk.stdin(b"input\n")
    talk.stdin(b"")
    assert talk.end() == {"exit_code": 3}
    assert talk.messages[0] == {"id": wire.WORKLOAD_SESSION, "tty": False, "position": 0}
    assert (talk.output(1), talk.output(2)) == (b"a client\ninput\n", b"bad\n")
    talk.leave()
    assert ended(agent)["exit_code"] == 3
    log = Reader(agent)
    assert log.read(len(b"a client\ninput\n")) == b"a client\ninput\n"
    assert log.read(len(b"bad\n"), wire.FRAME_STDERR) == b"bad\n"


def test_with_a_terminal_it_knows_its_size(agent: Asker) -> None:
    sh(agent, "stty size; tty >/dev/null && echo terminal")
    talk = attached(agent, tty=True, rows=7, cols=8)
    assert talk.end() == {"exit_code": 0}
    assert talk.output() == b"7 8\r\nterminal\r\n"


def test_it_goes_on_without_its_client_who_may_come_back(agent: Asker) -> None:
    sh(agent, "echo one; read line; echo $line; exec sleep 1000")
    talk = attached(agent)
    talk.see(b"one\n")
    talk.leave()
    again = Talk(agent, f"/v1/exec?attach={wire.WORKLOAD_SESSION}&from=4")
    again.stdin(b"two\n")
    again.see(b"two\n")
    assert again.output() == b"two\n"
    status = agent.ask("GET", wire.HEALTHZ).json()["workload"]
    assert status["state"] == "healthy"
    (listed,) = agent.ask("GET", "/v1/exec/sessions").json()["sessions"]
    assert (listed["id"], listed["pid"], listed["attached"]) == (wire.WORKLOAD_SESSION, status["pid"], True)


def test_it_has_ended_once_the_client_knows(agent: Asker) -> None:
    sh(agent, "exit 5")
    talk = attached(agent)
    talk.until(lambda: {"exit_code": 5} in talk.messages)
    # The client has not answered the closing frame: the daemon must not stop the VM yet.
    assert agent.ask("GET", wire.HEALTHZ).json()["workload"]["state"] == "healthy"
    talk.leave()
    assert ended(agent)["state"] == "failed"


def test_input_that_came_before_the_end_does_not_keep_it_from_ending(agent: Asker) -> None:
    sh(agent, "exec true")
    talk = Talk(agent, "/v1/exec?workload=true")
    talk.send(TextMessage(data="{}"), BytesMessage(data=b"\0input"))
    assert talk.end() == {"exit_code": 0}
    talk.send(CloseConnection(code=1000))
    assert ended(agent)["exit_code"] == 0


@pytest.mark.parametrize("how", ["stays", "leaves"])
def test_a_shutdown_sends_its_stop_signal_and_the_client_learns_how_it_ended(agent: Asker, how: str) -> None:
    sh(agent, "trap 'echo bye; exit 6' USR1; echo up; while :; do sleep 0.02; done", stop_signal="SIGUSR1")
    talk = attached(agent)
    talk.see(b"up")
    if how == "leaves":
        talk.leave()
    agent.server.workload.stop(20.0)
    if how == "stays":
        talk.see(b"bye")
        assert talk.end() == {"exit_code": 6}
    else:
        assert agent.ask("GET", wire.HEALTHZ).json()["workload"]["state"] == "exited"


def test_signals_of_the_client_and_leftovers(agent: Asker) -> None:
    sh(agent, "sleep 1000 & echo $!; wait")
    talk = attached(agent)
    talk.see(b"\n")
    talk.text({"signal": int(signal.SIGTERM)})
    assert talk.end() == {"signal": signal.SIGTERM}
    talk.leave()
    assert ended(agent)["signal"] == signal.SIGTERM
    assert gone(int(talk.output()))


@pytest.mark.parametrize("program", ["/nonexistent", "/etc/passwd"])
def test_a_program_that_does_not_start_is_the_clients_error_first(agent: Asker, program: str) -> None:
    put(agent, program, attach=True, restart="never")
    talk = attached(agent)
    talk.until(lambda: talk.messages)
    said = talk.messages[0]
    assert program in said["error"]
    assert agent.ask("GET", wire.HEALTHZ).json()["workload"]["state"] == "starting"
    talk.leave()
    status = ended(agent)
    assert (status["state"], status["error"]) == ("failed", said["error"])


def test_without_a_client_it_fails_after_a_while(agent: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workload, "_CLIENT_S", 0.05)
    sh(agent, "echo never")
    assert "no client has attached" in ended(agent)["error"]
    talk = attached(agent)
    assert "waits for no client: its state is failed" in talk.end()["error"]


def test_what_it_refuses(agent: Asker) -> None:
    assert Talk(agent, "/v1/exec?workload=true&attach=x").refused == 400
    assert Talk(agent, "/v1/exec?workload=yes").refused == 400
    sh(agent, "sleep 1000")
    wrong = attached(agent, command=["sh"])
    assert wrong.end()["field"] == "command"
    first = attached(agent)
    first.until(lambda: first.messages)
    second = attached(agent)
    assert "waits for no client: its state is healthy" in second.end()["error"]


def test_it_is_restarted_in_the_background(agent: Asker, tmp_path: Any) -> None:
    count = tmp_path / "count"
    script = f"echo x >> {count}; echo run; [ $(wc -l < {count}) -gt 2 ]"
    put(agent, "sh", "-c", script, attach=True, restart="on-failure")
    talk = attached(agent)
    assert talk.end() == {"exit_code": 1}
    talk.leave()
    assert wait_for(agent, lambda status: status["state"] == "exited")["restarts"] == 2
    assert count.read_text() == "x\nx\nx\n"


def test_its_health_check_counts(agent: Asker, tmp_path: Any) -> None:
    ready = tmp_path / "ready"
    sh(agent, f"read line; touch {ready}; exec sleep 1000", health_check={"command": ["test", "-e", str(ready)]})
    talk = attached(agent)
    talk.until(lambda: talk.messages)
    wait_for(agent, lambda status: status["state"] == "starting" and status["pid"])
    talk.stdin(b"\n")
    assert wait_for(agent, lambda status: status["state"] == "healthy")
