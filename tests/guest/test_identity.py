"""A clone gets its own clock, entropy, names and ids before it answers."""

from __future__ import annotations

import base64
import gc
import json
import os
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import TIMEOUT_S, Answer, Asker, read_all
from volant.guest import _identity, _network, _root
from volant.model import agent as wire

WANTED: dict[str, Any] = {
    "hostname": "demo-7",
    "machine_id": "0123456789abcdef0123456789abcdef",
    "entropy": base64.b64encode(bytes(64)).decode(),
    "time_ns": 1_700_000_000_000_000_000,
    "vm_id": 7,
}


NETWORK = {"address": "192.168.127.7", "prefix": 24, "gateway": "192.168.127.1", "mac": "02:00:00:00:00:07"}


class Kernel:
    """Records the calls to the kernel instead of changing this machine."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.broken = ""

    def take(self, what: str, value: object) -> None:
        if what == self.broken:
            raise PermissionError(1, "not permitted")
        self.calls.append((what, value))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    kernel = Kernel()
    for name in ("step_clock", "add_entropy", "set_hostname"):
        monkeypatch.setattr(_identity, name, lambda value, name=name: kernel.take(name, value))
    monkeypatch.setattr(_identity, "set_network", lambda *told: kernel.take("set_network", told))
    monkeypatch.setattr(_identity, "_instance_id", "")
    monkeypatch.setattr(_identity, "_notified_for", "")
    monkeypatch.setattr(_identity, "_BALLOON", str(tmp_path / "balloon"))
    monkeypatch.setattr(wire, "CLONE_FILE", str(tmp_path / "clone.json"))
    monkeypatch.setattr(_identity, "_MACHINE_ID", str(tmp_path / "machine-id"))
    monkeypatch.setattr(_root, "_known", ("none", ""))
    return kernel


def put(agent: Asker, path: str, body: object) -> Answer:
    return agent.ask("PUT", path, body)


def test_a_clone_takes_its_identity(agent: Asker, kernel: Kernel, tmp_path: Path) -> None:
    log_id, before = agent.server.output.id, _identity.instance_id()
    random.seed(1)
    answer = put(agent, wire.DAEMON_IDENTITY, WANTED)
    assert answer.status == 200, answer.body
    assert kernel.calls == [
        ("step_clock", WANTED["time_ns"]),
        ("add_entropy", bytes(64)),
        ("set_hostname", "demo-7"),
    ], "the clock comes first, as every moment counts"
    said = answer.json()
    assert said["instance_id"] not in (before, "")
    assert abs(said["time_ns"] - time.time_ns()) < 10**10
    assert (tmp_path / "machine-id").read_text() == WANTED["machine_id"] + "\n"
    found = json.loads((tmp_path / "clone.json").read_text())
    assert (found["hostname"], found["vm_id"], found["instance_id"]) == ("demo-7", 7, said["instance_id"])
    assert agent.server.output.id not in (log_id, "")
    assert _identity.instance_id() == said["instance_id"]
    drawn = random.random()
    random.seed(1)
    assert drawn != random.random(), "Python's own generator goes on from the template"


def test_the_machine_id_is_overwritten_in_place(agent: Asker, kernel: Kernel, tmp_path: Path) -> None:
    del kernel
    path = tmp_path / "machine-id"
    path.write_text("f" * 32 + "\n")
    before = path.stat().st_ino
    assert put(agent, wire.DAEMON_IDENTITY, WANTED).status == 200
    assert (path.read_text(), path.stat().st_ino) == (WANTED["machine_id"] + "\n", before)


@pytest.mark.parametrize("what", ["link", "other name", "pipe", "short"])
def test_an_unusual_machine_id_file_is_replaced(agent: Asker, kernel: Kernel, tmp_path: Path, what: str) -> None:
    del kernel
    path, other = tmp_path / "machine-id", tmp_path / "other"
    text = "uninitialized\n" if what == "short" else "f" * 32 + "\n"
    other.write_text(text)
    if what == "link":
        path.symlink_to(other)
    elif what == "other name":
        path.hardlink_to(other)
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(text)
    assert put(agent, wire.DAEMON_IDENTITY, WANTED).status == 200
    assert path.is_file()
    assert not path.is_symlink()
    assert path.read_text() == WANTED["machine_id"] + "\n"
    assert other.read_text() == text


def test_a_clone_unbinds_its_balloon(agent: Asker, kernel: Kernel, tmp_path: Path) -> None:
    del kernel
    for name in ("bind", "unbind", "module", "virtio3"):
        (tmp_path / "balloon").mkdir(exist_ok=True)
        (tmp_path / "balloon" / name).touch()
    assert put(agent, wire.DAEMON_IDENTITY, WANTED).status == 200
    # A thread does it after the answer.
    deadline = time.monotonic() + 30
    while not (said := (tmp_path / "balloon" / "unbind").read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert said == "virtio3"
    assert (tmp_path / "balloon" / "bind").read_text() == ""


def test_hosts_of_a_client_that_left_do_not_replace_newer_ones(
    agent: Asker, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests arrive while the first one runs; the client of the second one has left by then."""
    del kernel
    begun, go_on = threading.Event(), threading.Event()
    written: list[list[str]] = []

    def write_hosts(names: dict[str, str]) -> None:
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        written.append(sorted(names))

    monkeypatch.setattr(_network, "own_names", dict)
    monkeypatch.setattr(_network, "write_hosts", write_hosts)

    def ask(name: str) -> socket.socket:
        body = json.dumps({"hosts": {name: "192.168.127.8"}})
        head = f"PUT {wire.DAEMON_HOSTS} HTTP/1.1\r\nHost: agent\r\nContent-Length: {len(body)}\r\n\r\n"
        return agent.open((head + body).encode())

    first = ask("first")
    assert begun.wait(TIMEOUT_S)
    ask("older").close()
    newer = ask("newer")
    go_on.set()
    for asked in (first, newer):
        asked.shutdown(socket.SHUT_WR)
        assert Answer(read_all(asked)).status == 200
    deadline = time.monotonic() + TIMEOUT_S
    while agent.server.statistics()["streams"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert written == [["first"], ["newer"]]


def test_a_restarted_agent_keeps_the_instance_id(agent: Asker, kernel: Kernel) -> None:
    del kernel
    said = put(agent, wire.DAEMON_IDENTITY, WANTED).json()
    _identity._instance_id = ""
    assert _identity.instance_id() == said["instance_id"]


def test_the_identity_configures_the_network(agent: Asker, kernel: Kernel) -> None:
    more = {"nameservers": ["192.168.127.1"], "hosts": {"other": "192.168.127.8"}}
    assert put(agent, wire.DAEMON_IDENTITY, {**WANTED, "network": NETWORK}).status == 200
    assert put(agent, wire.DAEMON_IDENTITY, {**WANTED, "network": {**NETWORK, **more}}).status == 200
    (first, then) = [value for what, value in kernel.calls if what == "set_network"]
    assert (first[0], first[1].address, first[2:]) == ("demo-7", "192.168.127.7", (None, {}))
    assert then[2:] == (["192.168.127.1"], {"other": "192.168.127.8"})


@pytest.mark.parametrize("broken", ["step_clock", "add_entropy", "set_hostname", "set_network"])
def test_a_failure_of_the_system_is_reported(agent: Asker, kernel: Kernel, broken: str) -> None:
    kernel.broken = broken
    answer = put(agent, wire.DAEMON_IDENTITY, {**WANTED, "network": NETWORK})
    assert answer.status == 500
    assert "not permitted" in answer.json()["detail"]


def expected_of(workload: object) -> str:
    """Returns the malformed field of a workload."""
    return "unheard" if workload else "entrypoint"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hostname", "a b"),
        ("hostname", "x" * 64),
        ("machine_id", "0123"),
        ("machine_id", "g" * 32),
        ("entropy", base64.b64encode(bytes(63)).decode()),
        ("entropy", base64.b64encode(bytes(513)).decode()),
        ("entropy", "!"),
        ("time_ns", 1.5),
        ("time_ns", 0),
        ("vm_id", -1),
        ("signal", "SIGKILL"),
        ("manifest", {"version": "1"}),
        ("workload", {}),
        ("workload", {"entrypoint": ["true"], "unheard": 1}),
        ("network", None),
        ("network", {}),
        ("network", {**NETWORK, "unheard": 1}),
        ("network", {**NETWORK, "prefix": True}),
        ("network", {**NETWORK, "mac": 7}),
        ("network", {**NETWORK, "gateway": "10.0.0.1"}),
        ("network", {**NETWORK, "nameservers": "192.168.127.1"}),
        ("network", {**NETWORK, "nameservers": ["1.1.1.1\nsearch bank"]}),
        ("as_it_is", "yes"),
        ("unknown", 1),
    ],
)
def test_a_malformed_identity_is_refused_without_effect(
    agent: Asker, kernel: Kernel, field: str, value: object
) -> None:
    answer = put(agent, wire.DAEMON_IDENTITY, {**WANTED, field: value})
    assert answer.status == 400
    assert answer.json()["field"] == {"manifest": "name", "workload": expected_of(value)}.get(field, field)
    assert not kernel.calls
    assert agent.server.workload.status()["state"] == "none"


@pytest.mark.parametrize("hosts", [None, [], {"a": 1}, {"a": "1.1.1"}, {"a\n10.0.0.1 b": "10.0.0.1"}])
def test_malformed_hosts_are_refused(agent: Asker, kernel: Kernel, hosts: object) -> None:
    told = [put(agent, wire.DAEMON_HOSTS, {"hosts": hosts})]
    if hosts is not None:
        told.append(put(agent, wire.DAEMON_IDENTITY, {**WANTED, "network": {**NETWORK, "hosts": hosts}}))
    for answer in told:
        assert (answer.status, answer.json()["field"]) == (400, "hosts")
    assert not kernel.calls


def test_identity_manifest_and_workload_fit_one_request(agent: Asker, kernel: Kernel, tmp_path: Path) -> None:
    del kernel
    script = f'cp "$VOLANT_MANIFEST" {tmp_path}/part; mv {tmp_path}/part {tmp_path}/found; exec sleep 60'
    manifest, spec = {"name": "counter", "version": "3"}, {"entrypoint": ["/bin/sh", "-c", script]}
    try:
        for _ in range(2):
            # Again, as after a lost answer.
            answer = put(agent, wire.DAEMON_IDENTITY, {**WANTED, "manifest": manifest, "workload": spec})
            assert answer.status == 200, answer.body
        assert put(agent, wire.DAEMON_WORKLOAD, spec).status == 200
        assert agent.ask("GET", wire.INFO).json()["plugin"]["name"] == "counter"
        deadline = time.monotonic() + 20
        while not (tmp_path / "found").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads((tmp_path / "found").read_text()) == manifest
        other = {**WANTED, "workload": {"entrypoint": ["true"]}}
        assert put(agent, wire.DAEMON_IDENTITY, other).status == 409
    finally:
        agent.server.workload.stop(0.0)


def test_the_clock_can_be_set(agent: Asker, kernel: Kernel) -> None:
    answer = put(agent, wire.DAEMON_CLOCK, {"time_ns": 5})
    assert answer.status == 200
    assert kernel.calls == [("step_clock", 5)]


def test_the_clock_can_be_moved_by_a_step(agent: Asker, kernel: Kernel) -> None:
    before = time.time_ns()
    assert put(agent, wire.DAEMON_CLOCK, {"step_ns": 10**9}).status == 200
    ((_, to),) = kernel.calls
    assert before <= to - 10**9 <= time.time_ns()
    assert put(agent, wire.DAEMON_CLOCK, {"step_ns": 0}).status == 200
    assert len(kernel.calls) == 1, "a question alone leaves it as it is"
    for nonsense in (True, "1", 1.5, 10**18):
        assert put(agent, wire.DAEMON_CLOCK, {"step_ns": nonsense}).status == 400


def test_a_copied_workload_is_signalled_and_must_become_healthy(agent: Asker, kernel: Kernel, tmp_path: Path) -> None:
    del kernel
    signals, well = tmp_path / "signals", tmp_path / "well"
    well.touch()
    script = f"trap 'echo x >> {signals}' USR1; touch {tmp_path}/up; while :; do sleep 0.05; done"
    spec = {
        "entrypoint": ["/bin/sh", "-c", script],
        "restart": "never",
        "health_check": {"command": ["/bin/sh", "-c", f"test -e {well} -a -e {tmp_path}/up"], "interval_s": 0.1},
    }
    try:
        assert put(agent, wire.DAEMON_WORKLOAD, spec).status == 200
        deadline = time.monotonic() + 20
        while agent.server.workload.status()["state"] != "healthy" and time.monotonic() < deadline:
            time.sleep(0.02)
        answer = put(agent, wire.DAEMON_IDENTITY, {**WANTED, "signal": "SIGUSR1"})
        assert answer.status == 200, answer.body
        # A file is there before its content.
        while not (signals.exists() and signals.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert signals.read_text() == "x\n"
        well.unlink()
        _identity._HEALTHY_S, before = 0.3, _identity._HEALTHY_S
        try:
            answer = put(agent, wire.DAEMON_IDENTITY, {**WANTED, "machine_id": "1" * 32})
        finally:
            _identity._HEALTHY_S = before
        assert answer.status == 503
        assert "not well" in answer.json()["detail"]
        assert signals.read_text() == "x\n"
        # `as_it_is`: not checked, but still signalled.
        other = {**WANTED, "machine_id": "2" * 32, "signal": "SIGUSR1", "as_it_is": True}
        # A repeated request, as after a lost answer, is not another copy.
        for _ in range(2):
            answer = put(agent, wire.DAEMON_IDENTITY, other)
            assert answer.status == 200, answer.body
            while signals.read_text() != "x\nx\n" and time.monotonic() < deadline:
                time.sleep(0.02)
            assert signals.read_text() == "x\nx\n"
    finally:
        agent.server.workload.stop(0.0)


def test_settle_prepares_the_guest_for_a_snapshot(agent: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(os, "sync", lambda: done.append("sync"))
    monkeypatch.setattr(gc, "freeze", lambda: done.append("freeze"))
    assert agent.ask("POST", wire.DAEMON_SETTLE).status == 200
    assert done == ["freeze", "sync"]
