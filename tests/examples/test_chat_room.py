"""The chat room: members receive each other's messages, survive a crash of the room, and never block one another."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from actors import TEMPORARY, Child, DynamicSupervisor, Log, Supervisor, open_system
from examples.chat_room.connection import Connection
from examples.chat_room.room import Room
from tests.processes import read_line

from .kit import ENVIRONMENT, ROOT


@pytest.fixture
def port() -> Iterator[int]:
    server = subprocess.Popen(
        [sys.executable, "-m", "examples.chat_room"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with server:
        try:
            yield int(read_line(server).rpartition(" ")[2])
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
        finally:
            server.kill()


class Client:
    def __init__(self, port: int, name: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.lines = self.socket.makefile("rw")
        assert self.lines.readline() == "your name?\n"
        self.say(name)

    def say(self, text: str) -> None:
        self.lines.write(text + "\n")
        self.lines.flush()

    def hear(self, text: str) -> None:
        """Reads lines until `text` arrives."""
        while True:
            line = self.lines.readline()
            assert line, f"the end, before {text!r}"
            if line == text + "\n":
                return

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


def test_people_talk_and_the_room_survives_its_crash(port: int) -> None:
    ada = Client(port, "ada")
    ada.say("anybody?")
    ada.hear("ada: anybody?")
    bob = Client(port, "ada")
    assert bob.lines.readline() == "that name is taken; your name?\n"
    bob.say("bob")
    ada.hear("* bob is here")
    bob.say("me")
    ada.hear("bob: me")
    bob.hear("bob: me")
    bob.say("/crash")
    bob.hear("! the room crashed, and that was lost")
    ada.hear("* ada is here")  # again; what she says before that may be lost too
    ada.say("still there")
    bob.hear("ada: still there")
    bob.close()
    ada.hear("* bob has left")
    ada.close()


async def test_a_client_that_does_not_read_blocks_nobody_and_is_dropped(autojump_clock: MockClock) -> None:
    log = Log(max_frames=100, max_bytes=10_000)
    room = Child("room", partial(Room, log))
    connections = DynamicSupervisor()
    async with open_system(Supervisor(children=[room, Child("connections", connections)])) as system:
        clients = {}
        for name in ("fast", "deaf"):
            clients[name], server = memory_stream_pair()
            if name == "deaf":
                server.send_stream.send_all_hook = trio.sleep_forever
            await connections.start_child(Child(name, partial(Connection, server, room.ref, log), TEMPORARY))
            await clients[name].send_all(f"{name}\n".encode())
        await clients["fast"].send_all(b"hello\n")
        heard = b""
        while b"fast: hello" not in heard:
            heard += await clients["fast"].receive_some()
        assert trio.current_time() < 1
        await trio.sleep(11)
        assert connections.names == ["fast"]
        assert system["room"].inspect()["actor"]["members"] == ["fast"]
