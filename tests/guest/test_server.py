"""The agent's server: a limit on streams, a reserve for the daemon, and no leaks."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.guest.conftest import Answer, Asker, read_all
from volant import __version__
from volant.guest import _identity, _main, _server
from volant.guest._watch import Wakeup
from volant.model import agent as wire


def wait_for_streams(agent: Asker, count: int) -> None:
    end = time.monotonic() + 10
    while agent.server.statistics()["streams"] != count and time.monotonic() < end:
        time.sleep(0.01)
    assert agent.server.statistics()["streams"] == count


def test_above_the_limit_only_daemon_routes_are_served_until_the_reserve_is_used(agent: Asker) -> None:
    held = [agent.open() for _ in range(wire.MAX_STREAMS)]
    assert agent.ask("GET", wire.INFO).status == 503
    assert agent.ask("POST", wire.EXEC, {"command": ["true"]}).status == 503
    assert agent.ask("GET", wire.HEALTHZ).status == 200
    assert agent.ask("GET", wire.DAEMON_WORKLOAD).status == 200
    wait_for_streams(agent, wire.MAX_STREAMS)
    held += [agent.open() for _ in range(wire.RESERVED_STREAMS)]
    sock = agent.open()
    answer = Answer(read_all(sock))
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    for one in held:
        one.close()
    wait_for_streams(agent, 0)
    assert agent.ask("GET", wire.INFO).status == 200


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_thousand_streams_leave_nothing_open(agent: Asker) -> None:
    agent.ask("GET", wire.INFO)
    before = count_descriptors()
    for number in range(1000):
        sock = agent.open(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" if number % 2 else b"GET /heal")
        if number % 3:
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
        sock.close()
    wait_for_streams(agent, 0)
    assert count_descriptors() <= before


def test_few_threads_stay_without_a_stream_and_new_streams_need_no_others(agent: Asker) -> None:
    # Servers of other tests have some, too.
    others = count_stream_threads()
    held = [agent.open() for _ in range(8)]
    wait_for_streams(agent, 8)
    for one in held:
        one.close()
    wait_for_streams(agent, 0)
    end = time.monotonic() + 20
    while count_stream_threads() > others + 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert count_stream_threads() == others + 2
    held = [agent.open() for _ in range(5)]
    assert agent.ask("GET", wire.HEALTHZ).status == 200
    wait_for_streams(agent, 5)
    for one in held:
        one.close()


def count_stream_threads() -> int:
    return sum(thread.name == "stream" for thread in threading.enumerate())


def test_healthz_and_info_follow_the_contract(agent: Asker) -> None:
    health = agent.ask("GET", wire.HEALTHZ).json()
    assert health["status"] == "ok"
    assert health["protocol"] == wire.PROTOCOL_VERSION
    assert health["agent"] == __version__
    assert health["uptime_s"] >= 0
    info = agent.ask("GET", wire.INFO).json()
    assert info["protocol"] == {"min": wire.PROTOCOL_MIN, "max": wire.PROTOCOL_VERSION}
    assert info["kernel"] == os.uname().release
    assert info["memory"]["total_mb"] >= info["memory"]["available_mb"] > 0
    assert len(info["boot_id"]) == 36


def test_head_has_the_length_and_no_body(agent: Asker) -> None:
    data = agent.raw(b"HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"content-length: " in data.lower()
    assert data.endswith(b"\r\n\r\n")


def test_a_shutdown_is_answered_before_it_begins(agent: Asker) -> None:
    answer = agent.ask("POST", wire.DAEMON_SHUTDOWN, {"grace_s": 3})
    assert answer.status == 202
    assert agent.ask("POST", wire.DAEMON_SHUTDOWN, b"").status == 202
    wait_for_streams(agent, 0)
    assert agent.shut_down_with == [3.0, wire.DEFAULT_GRACE_S]
    for bad in ({"grace_s": -1}, {"grace_s": 1e9}, {"grace": 1}, {"grace_s": float("nan")}):
        assert agent.ask("POST", wire.DAEMON_SHUTDOWN, bad).status == 400


def test_a_bug_in_the_agent_is_a_500_that_names_it(agent: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(agent.server, "healthz", broken)
    answer = agent.ask("GET", wire.HEALTHZ)
    assert answer.status == 500
    assert "broken on purpose" in answer.json()["detail"]


def test_a_command_waits_until_the_guest_is_set_up(agent: Asker) -> None:
    agent.server.set_up.clear()
    lines: list[object] = []
    command = threading.Thread(target=lambda: lines.extend(agent.run("true")))
    command.start()
    # A waiting command makes the setup begin at once, even before the first answer.
    assert agent.server.answered.wait(5)
    agent.server.wait_for_quiet(60, 60)
    assert agent.ask("GET", "/healthz").status == 200
    assert not lines
    agent.server.set_up.set()
    command.join(10)
    assert lines == [{"exit_code": 0}]


def test_a_workload_waits_until_the_guest_is_set_up(agent: Asker) -> None:
    agent.server.set_up.clear()
    put = threading.Thread(target=lambda: agent.ask("PUT", "/v1/daemon/workload", {"entrypoint": ["true"]}))
    put.start()
    assert agent.server.answered.wait(5)
    assert agent.server.workload.status()["state"] == "none"
    agent.server.set_up.set()
    put.join(10)
    assert not put.is_alive()


def test_what_needs_the_setup_is_refused_or_unanswered_while_it_takes_long(
    agent: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_server, "_SET_UP_S", 0.05)
    agent.server.set_up.clear()
    answer = agent.ask("POST", wire.EXEC, {"command": ["true"]})
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert agent.ask("GET", wire.DAEMON_ROOT).json()["state"] == "pending"
    identity = b"PUT /v1/daemon/identity HTTP/1.1\r\nHost: agent\r\nContent-Length: 2\r\n\r\n{}"
    assert agent.raw(identity) == b"", "the daemon sends it again, with another time"
    agent.server.set_up.set()
    assert agent.ask("GET", wire.DAEMON_ROOT).json()["state"] == "none"
    assert Answer(agent.raw(identity)).status == 400


def test_an_identity_whose_sender_has_left_is_not_taken(agent: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []
    monkeypatch.setattr(_identity, "serve_identity", lambda *given: taken.append(given))
    agent.server.set_up.clear()
    agent.open(b"PUT /v1/daemon/identity HTTP/1.1\r\nHost: agent\r\nContent-Length: 2\r\n\r\n{}").close()
    assert agent.server.answered.wait(5), "it waits"
    agent.server.set_up.set()
    wait_for_streams(agent, 0)
    assert not taken


def test_the_setup_ends_with_pid_1s_pipe_and_the_wait_for_it_with_a_shutdown() -> None:
    end = Wakeup()
    pipe, writer = os.pipe()
    os.close(writer)
    assert _main._is_set_up(pipe, end.fd)
    pipe, writer = os.pipe()
    end.wake()
    assert not _main._is_set_up(pipe, end.fd)
    os.close(writer)
    end.close()


def test_waiting_for_quiet_ends_after_a_pause_or_the_limit(agent: Asker) -> None:
    agent.server.wait_for_quiet(0.05, 3600)
    agent.ask("GET", "/healthz")
    agent.server.wait_for_quiet(3600, 0.05)
