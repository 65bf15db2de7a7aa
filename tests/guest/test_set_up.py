"""Commands wait until the guest is set up; other requests are answered before the setup uses the CPU."""

from __future__ import annotations

import threading

from tests.guest.conftest import Asker


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


def test_waiting_for_quiet_ends_after_a_pause_or_the_limit(agent: Asker) -> None:
    agent.server.wait_for_quiet(0.05, 3600)
    agent.ask("GET", "/healthz")
    agent.server.wait_for_quiet(3600, 0.05)
