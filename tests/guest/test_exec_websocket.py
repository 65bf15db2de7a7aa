"""Exec over a WebSocket: channels, terminals, signals, detaching, and clients that break the protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    Pong,
    RejectConnection,
    Request as Asked,
    TextMessage,
)

from tests.guest.conftest import TIMEOUT_S, Asker
from tests.guest.test_exec_http import gone
from volant.guest import _exec_session, _exec_sessions
from volant.guest._exec_program import OutputHistory
from volant.guest._exec_session import Peer


class Talk:
    """A client of one WebSocket."""

    def __init__(self, agent: Asker, target: str = "/v1/exec", first: object = None) -> None:
        self.sock = agent.open()
        self._ws = WSConnection(ConnectionType.CLIENT)
        self.sock.sendall(self._ws.send(Asked(host="agent", target=target)))
        self.messages: list[Any] = []
        self._parts: list[Any] = []
        self.pongs: list[bytes] = []
        self.closed: int | None = None
        self.reason = ""
        self.refused = 0
        self.accepted = False
        while not self.accepted and not self.refused:
            self._pump()
        if first is not None:
            self.text(first)

    def _pump(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            self.closed = self.closed if self.closed is not None else 1006
            return
        self._ws.receive_data(data)
        for event in self._ws.events():
            if isinstance(event, AcceptConnection):
                self.accepted = True
            elif isinstance(event, RejectConnection):
                self.refused = event.status_code
            elif isinstance(event, Message):
                self._parts.append(event.data)
                if event.message_finished:
                    whole = type(event.data)().join(self._parts)
                    self.messages.append(json.loads(whole) if isinstance(whole, str) else bytes(whole))
                    self._parts = []
            elif isinstance(event, Pong):
                self.pongs.append(bytes(event.payload))
            elif isinstance(event, CloseConnection):
                self.closed, self.reason = event.code, event.reason or ""

    def text(self, value: object) -> None:
        self.sock.sendall(self._ws.send(TextMessage(data=value if isinstance(value, str) else json.dumps(value))))

    def stdin(self, data: bytes) -> None:
        self.sock.sendall(self._ws.send(BytesMessage(data=b"\0" + data)))

    def send(self, *events: Any) -> None:
        """Sends them in one piece."""
        self.sock.sendall(b"".join(self._ws.send(event) for event in events))

    def until(self, enough: Callable[[], object]) -> None:
        while not enough() and self.closed is None:
            self._pump()
        assert enough(), (self.messages[-3:], self.closed, self.reason)

    def output(self, channel: int = 1) -> bytes:
        return b"".join(
            message[1:] for message in self.messages if isinstance(message, bytes) and message[0] == channel
        )

    def see(self, data: bytes, channel: int = 1) -> None:
        self.until(lambda: data in self.output(channel))

    def end(self) -> Any:
        """The last message, after a clean close."""
        self.until(lambda: self.closed is not None)
        assert self.closed == 1000, (self.closed, self.reason)
        return self.messages[-1]

    def leave(self) -> None:
        self.sock.close()


def sh(agent: Asker, script: str, *, query: str = "", **fields: object) -> Talk:
    return Talk(agent, f"/v1/exec{query}", {"command": ["sh", "-c", script], **fields})


def test_channels_end_one_by_one_and_the_exit_code_comes_last(agent: Asker) -> None:
    talk = sh(agent, "cat; echo done >&2; exit 3")
    talk.stdin(b"hello ")
    talk.stdin(b"world")
    talk.stdin(b"")
    assert talk.end() == {"exit_code": 3}
    assert talk.output() == b"hello world"
    assert talk.output(2) == b"done\n"
    assert b"\x01" in talk.messages
    assert b"\x02" in talk.messages
    assert talk.messages.index(b"\x01") > 0


def test_a_signal_and_an_error_are_reported(agent: Asker) -> None:
    talk = sh(agent, "echo up; sleep 60")
    talk.see(b"up")
    talk.text({"signal": int(signal.SIGTERM)})
    assert talk.end() == {"signal": signal.SIGTERM}
    assert Talk(agent, first={"command": ["/no/such"]}).end()["code"] == "not_found"
    late = Talk(agent, first={"command": ["sleep", "60"], "timeout_s": 0.05}).end()
    assert late["code"] == "timeout"


@pytest.mark.parametrize(
    ("first", "field"),
    [
        ({"command": []}, "command"),
        ({"command": ["true"], "tty": 1}, "tty"),
        ({"command": ["true"], "tty": True, "rows": 0}, "rows"),
        ({"command": ["true"], "cols": 70000}, "cols"),
        ({"command": ["true"], "shell": True}, "shell"),
    ],
)
def test_a_wrong_request_names_its_field(agent: Asker, first: object, field: str) -> None:
    end = Talk(agent, first=first).end()
    assert end["code"] == "invalid_request"
    assert end["field"] == field


def test_a_terminal_has_a_size_that_can_change(agent: Asker) -> None:
    talk = sh(agent, "stty size; trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done", tty=True,
              rows=11, cols=44)  # fmt: skip
    talk.see(b"ready")
    assert b"11 44\r\n" in talk.output()
    talk.text({"resize": [50, 132]})
    assert talk.end() == {"exit_code": 0}
    assert b"50 132\r\n" in talk.output()


def test_a_terminal_is_the_sessions_own(agent: Asker) -> None:
    talk = sh(agent, "tty; echo $TERM; echo secret > /dev/tty", tty=True)
    assert talk.end() == {"exit_code": 0}
    lines = talk.output().split(b"\r\n")
    assert lines[0].startswith(b"/dev/pts/")
    assert lines[1:3] == [b"xterm", b"secret"]


def test_keys_become_signals_and_ends_of_input_in_a_terminal(agent: Asker) -> None:
    talk = sh(agent, "trap 'exit 42' INT; echo up; while :; do sleep 0.05; done", tty=True)
    talk.see(b"up")
    talk.stdin(b"\x03")
    assert talk.end() == {"exit_code": 42}
    talk = sh(agent, "stty -echo; echo up; cat", tty=True)
    talk.see(b"up")
    talk.stdin(b"half a line")
    talk.stdin(b"")
    assert talk.end() == {"exit_code": 0}
    assert talk.output().endswith(b"half a line")


@pytest.mark.parametrize("tty", [False, True])
def test_a_client_that_leaves_ends_the_whole_session(agent: Asker, tty: bool) -> None:
    # Job control gives the background job a process group of its own, and it ignores SIGHUP.
    script = "set -m; trap '' HUP; sleep 1000 & echo $! $$; wait"
    talk = sh(agent, script, tty=tty)
    talk.see(b"\n")
    pids = [int(word) for word in talk.output().split()]
    talk.leave()
    assert all(gone(pid) for pid in pids)


def test_a_closing_frame_ends_the_command(agent: Asker) -> None:
    talk = sh(agent, "echo $$; sleep 1000")
    talk.see(b"\n")
    talk.send(CloseConnection(code=1000))
    talk.until(lambda: talk.closed == 1000)
    assert gone(int(talk.output()))


def test_input_waits_until_the_command_reads_it(agent: Asker) -> None:
    talk = sh(agent, "echo up; sleep 1000")
    talk.see(b"up")
    data = os.urandom(6 << 20)
    sent = 0
    talk.sock.setblocking(False)
    frames = b"".join(
        talk._ws.send(BytesMessage(data=b"\0" + data[at : at + 65536])) for at in range(0, len(data), 65536)
    )
    while select.select([], [talk.sock], [], 0.3)[1]:
        sent += talk.sock.send(frames[sent : sent + 65536])
    assert sent < 4 << 20
    talk.sock.settimeout(TIMEOUT_S)
    talk.leave()

    talk = sh(agent, "read line; sha256sum")
    talk.stdin(b"go\n")

    def send() -> None:
        for at in range(0, len(data), 65536):
            talk.stdin(data[at : at + 65536])

    sender = threading.Thread(target=send)
    sender.start()
    sender.join()
    talk.stdin(b"")
    assert talk.end() == {"exit_code": 0}
    assert talk.output().split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_output_waits_until_the_client_reads_it(agent: Asker) -> None:
    talk = sh(agent, "echo $$; i=0; while [ $i -lt 400 ]; do head -c 65536 /dev/zero; i=$((i+1)); done; echo end >&2")
    talk.see(b"\n")
    pid = int(talk.output().split(b"\n")[0])
    assert not gone_within(pid, 0.3)
    assert talk.end() == {"exit_code": 0}
    assert len(talk.output()) == 400 * 65536 + len(str(pid)) + 1
    assert talk.output(2) == b"end\n"


def gone_within(pid: int, seconds: float) -> bool:
    fd = os.pidfd_open(pid)
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def test_a_command_may_ignore_its_input(agent: Asker) -> None:
    talk = sh(agent, "exec 0<&-; echo up; sleep 0.2; echo over")
    talk.see(b"up")
    for _ in range(40):
        talk.stdin(bytes(65536))
    talk.stdin(b"")
    assert talk.end() == {"exit_code": 0}


# Detaching


def test_a_detached_command_goes_on_and_loses_no_output(agent: Asker) -> None:
    script = "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); [ $i = 20 ] && read go; done; exit 9"
    talk = sh(agent, script, query="?detach=true")
    talk.see(b"line 5\n")
    hello = talk.messages[0]
    assert hello["tty"] is False
    assert hello["position"] == 0
    got = talk.output()
    talk.leave()
    again = Talk(agent, f"/v1/exec?attach={hello['id']}&from={len(got)}")
    again.until(lambda: b"line 19\n" in got + again.output())
    again.stdin(b"go\n")
    assert again.end() == {"exit_code": 9}
    assert got + again.output() == b"".join(b"line %d\n" % i for i in range(300))
    assert not [message for message in again.messages if isinstance(message, dict) and "gap" in message]
    # Its end and all of its output are kept.
    third = Talk(agent, f"/v1/exec?attach={hello['id']}")
    assert third.end() == {"exit_code": 9}
    assert third.output() == got + again.output()


def test_a_client_may_attach_before_the_command_has_its_thread(agent: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _exec_session.Session.run

    def late(session: _exec_session.Session, peer: Peer | None = None) -> None:
        while not session._next:
            time.sleep(0.001)
        run(session, peer)

    monkeypatch.setattr(_exec_session.Session, "run", late)
    talk = sh(agent, "echo hello", query="?detach=true")
    assert talk.end() == {"exit_code": 0}
    assert talk.output() == b"hello\n"


def test_dropped_output_is_reported_as_a_gap(agent: Asker) -> None:
    talk = sh(agent, "read go; head -c 3000000 /dev/zero; echo over", query="?detach=true")
    talk.until(lambda: talk.messages)
    identifier = talk.messages[0]["id"]
    talk.stdin(b"go\n")
    talk.see(b"\0" * 1000)
    talk.leave()
    listed(agent, identifier, lambda found: found["end"] is not None)
    again = Talk(agent, f"/v1/exec?attach={identifier}&from=10")
    assert again.end() == {"exit_code": 0}
    gap = again.messages[1]["gap"]
    assert gap["from"] == 10
    assert again.messages[0]["position"] == gap["to"] + 1
    assert gap["to"] + 1 + len(again.output()) == 3000005
    assert len(again.output()) <= _exec_session.KEPT_BYTES
    assert again.output().endswith(b"over\n")


def test_small_pieces_of_output_are_joined(agent: Asker) -> None:
    del agent
    output = OutputHistory(_exec_session.KEPT_BYTES)
    for i in range(200_000):
        output.add(1 + i % 2, b"x")
        output.release(output.position)
    assert len(output._pieces) < 10_000
    assert sum(len(data) for _, data in output.after(output.oldest, 1 << 30)) == output.position - output.oldest


def test_a_second_client_takes_over(agent: Asker) -> None:
    talk = sh(agent, "echo up; cat", query="?detach=true", tty=True)
    talk.see(b"up")
    identifier = talk.messages[0]["id"]
    second = Talk(agent, f"/v1/exec?attach={identifier}")
    second.see(b"up")
    talk.until(lambda: talk.closed == 4000)
    second.stdin(b"to the second\n")
    second.see(b"to the second")
    assert listed(agent, identifier, lambda found: True)["attached"] is True
    assert agent.ask("DELETE", f"/v1/exec/sessions/{identifier}").status == 204
    assert second.end() == {"signal": signal.SIGKILL}
    assert agent.ask("GET", f"/v1/exec/sessions/{identifier}").status == 404
    assert Talk(agent, f"/v1/exec?attach={identifier}").refused == 404


def listed(agent: Asker, identifier: str, enough: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        for found in agent.ask("GET", "/v1/exec/sessions").json()["sessions"]:
            if found["id"] == identifier and enough(found):
                return dict(found)
        time.sleep(0.01)
    raise AssertionError("it is not listed so")


def test_detached_commands_are_bounded_and_ended_ones_make_room(agent: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exec_sessions, "MAX_SESSIONS", 2)
    first = sh(agent, "read go", query="?detach=true")
    second = sh(agent, "read go", query="?detach=true")
    for talk in (first, second):
        talk.until(lambda talk=talk: talk.messages)  # type: ignore[misc]
    assert Talk(agent, "/v1/exec?detach=true").refused == 503
    first.stdin(b"go\n")
    assert first.end() == {"exit_code": 0}
    third = sh(agent, "exit 5", query="?detach=true")
    assert third.end() == {"exit_code": 5}
    kept = [found["id"] for found in agent.ask("GET", "/v1/exec/sessions").json()["sessions"]]
    assert kept == [second.messages[0]["id"], third.messages[0]["id"]]
    # A command that does not start does not count.
    assert Talk(agent, "/v1/exec?detach=true", {"command": ["/no/such"]}).end()["code"] == "not_found"
    assert len(agent.ask("GET", "/v1/exec/sessions").json()["sessions"]) == 1
    monkeypatch.setattr(_exec_sessions, "KEPT_S", 0.0)
    agent.ask("DELETE", f"/v1/exec/sessions/{kept[0]}")
    assert agent.ask("GET", "/v1/exec/sessions").json() == {"sessions": []}


# Clients that break the protocol


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x82\x01\x00", 1002),  # without a mask
        (b"\xc2\x81\0\0\0\0\x00", 1002),  # compressed, which was not negotiated
        (b"\x83\x80\0\0\0\0", 1002),  # an unknown opcode
        (b"\x80\x80\0\0\0\0", 1002),  # a continuation of nothing
        (b"\x89\xfe\x00\x7e\0\0\0\0" + bytes(126), 1002),  # a long ping
        (b"\x09\x80\0\0\0\0", 1002),  # a fragmented ping
        (b"\x81\x82\0\0\0\0\xff\xff", 1007),  # not UTF-8
        (b"\x82\xff" + struct.pack("!Q", 1 << 40) + bytes(4) + bytes((1 << 20) + 2), 1009),
        (b"\x82\x82\0\0\0\0\x01x", 1008),  # standard output is not for clients
        (b"\x82\x80\0\0\0\0", 1008),  # without a channel
        (b"\x81\x82\0\0\0\0{}", 1008),
        (b"\x81\x83\0\0\0\0no!", 1008),
    ],
)
def test_a_broken_protocol_ends_the_command_and_says_why(agent: Asker, data: bytes, code: int) -> None:
    talk = sh(agent, "echo $$; sleep 1000")
    talk.see(b"\n")
    talk.sock.sendall(data)
    talk.until(lambda: talk.closed is not None)
    assert talk.closed == code
    assert gone(int(talk.output()))


@pytest.mark.parametrize(
    "order", [{"signal": 0}, {"signal": True}, {"signal": 65}, {"resize": [1, 2]}, {"signal": 1, "resize": [1, 1]}, [1]]
)
def test_a_malformed_control_message_closes(agent: Asker, order: object) -> None:
    talk = sh(agent, "sleep 1000")
    talk.text(order)
    talk.until(lambda: talk.closed == 1008)


def test_pings_are_answered_and_fragments_joined(agent: Asker) -> None:
    talk = sh(agent, "cat")
    talk.send(Ping(payload=b"are you there"))
    talk.until(lambda: talk.pongs == [b"are you there"])
    talk.send(BytesMessage(data=b"\0one", message_finished=False))
    talk.send(Ping(payload=b"between"))
    talk.send(BytesMessage(data=b" two", message_finished=True))
    talk.see(b"one two")
    assert talk.pongs[1:] == [b"between"]
    talk.stdin(b"")
    assert talk.end() == {"exit_code": 0}


def test_messages_behind_the_first_one_are_not_lost(agent: Asker) -> None:
    ws = WSConnection(ConnectionType.CLIENT)
    sock = agent.open(ws.send(Asked(host="agent", target="/v1/exec")))
    answer = sock.recv(65536)
    ws.receive_data(answer)
    assert isinstance(next(iter(ws.events())), AcceptConnection)
    data = ws.send(TextMessage(data=json.dumps({"command": ["cat"], "stdin": base64.b64encode(b"a").decode()})))
    sock.sendall(data + ws.send(BytesMessage(data=b"\0b")) + ws.send(BytesMessage(data=b"\0")))
    found: list[object] = []
    while not any(isinstance(event, CloseConnection) for event in found):
        ws.receive_data(sock.recv(65536))
        found += list(ws.events())
    assert b"".join(event.data[1:] for event in found if isinstance(event, BytesMessage)) == b"ab"


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        ("/v1/exec", "", 426),
        ("/v1/exec", "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n", 400),
        ("/v1/exec", "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 8\r\n", 426),
        ("/v1/exec", "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
         "Sec-WebSocket-Key: eA==\r\n", 400),
        ("/v1/exec?detach=yes", "Upgrade: websocket\r\n", 400),
        ("/v1/exec?from=1", "Upgrade: websocket\r\n", 400),
        ("/v1/exec?attach=a&from=-1", "Upgrade: websocket\r\n", 400),
        ("/v1/exec?attach=a&detach=true", "Upgrade: websocket\r\n", 400),
        ("/v1/exec?attach=a", "Upgrade: websocket\r\n", 404),
        ("/v1/exec?other=a", "Upgrade: websocket\r\n", 400),
        ("/v1/exec?attach=%zz", "Upgrade: websocket\r\n", 400),
    ],
)  # fmt: skip
def test_a_malformed_handshake_gets_an_http_error(agent: Asker, target: str, headers: str, status: int) -> None:
    answer = agent.ask("GET", target, headers=headers)
    assert answer.status == status
    assert answer.headers["content-type"] == "application/problem+json"


def test_sessions_leak_no_threads_and_descriptors(agent: Asker) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd")) + threading.active_count()  # noqa: PTH208

    sh(agent, "true").end()
    before = count()
    for query in ("", "?detach=true"):
        for tty in (False, True):
            talk = sh(agent, "echo x", query=query, tty=tty)
            talk.end()
            talk.leave()
    end = time.monotonic() + TIMEOUT_S
    while count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert count() <= before


def test_a_client_that_sends_no_command_is_closed(agent: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exec_sessions, "HEAD_TIMEOUT_S", 0.05)
    talk = Talk(agent)
    talk.until(lambda: talk.closed == 1008)
