"""A key goes over loopback only to a daemon of root, of our own user, or of one that we trust."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
import trio

from volant.client import Client, ClientError, ClientProblem, Unreachable
from volant.client._plain import PlainClient, run_plain

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start the process of another user")

_KEY = "a-key-that-nobody-else-may-get"
_USER = 64_321
_LISTENER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0), family=int(sys.argv[2]))
print(listener.getsockname()[1], flush=True)
while True:
    client, _ = listener.accept()
    with client:
        got = b""
        while data := client.recv(65536):
            got += data
            if b"\\r\\n\\r\\n" in got:
                client.sendall(b"HTTP/1.1 500 No\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
                break
    print(got, flush=True)
"""


class Stranger:
    """A process of another user that listens where the daemon should."""

    def __init__(self, process: subprocess.Popen[str], host: str) -> None:
        assert process.stdout is not None
        self._lines = process.stdout
        self.base_url = f"http://{host}:{int(self._lines.readline())}"

    def got(self) -> str:
        """What the next connection brought."""
        return self._lines.readline()


@contextmanager
def listening(address: str = "127.0.0.1") -> Iterator[Stranger]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    command = ["/usr/bin/python3", "-I", "-c", _LISTENER, address, str(int(family))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, user=_USER, cwd="/") as process:
        try:
            yield Stranger(process, "[::1]" if family == socket.AF_INET6 else "127.0.0.1")
        finally:
            process.kill()


async def plain(base_url: str) -> None:
    run_plain(PlainClient(base_url, api_key=_KEY).healthz())


async def http(base_url: str) -> None:
    async with Client(base_url, api_key=_KEY) as client:
        await client.healthz()


async def websocket(base_url: str) -> None:
    async with Client(base_url, api_key=_KEY) as client, client.vms.exec_session("demo", ["true"]):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
@pytest.mark.parametrize("ask", [plain, http, websocket])
async def test_another_user_who_listens_gets_no_key(ask: Callable[[str], Awaitable[None]], address: str) -> None:
    with listening(address) as stranger, trio.fail_after(20):
        with pytest.raises(Unreachable, match=f"user {_USER} of this host"):
            await ask(stranger.base_url)
        assert stranger.got() == "b''\n"


@pytest.mark.parametrize("trusted", [str(_USER), f"7, {_USER}", "all"])
@pytest.mark.parametrize("ask", [plain, http, websocket])
async def test_a_user_who_is_trusted_gets_it(
    ask: Callable[[str], Awaitable[None]], trusted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOLANT_TRUSTED_UIDS", trusted)
    with listening() as stranger, trio.fail_after(20):
        with pytest.raises((ClientError, ClientProblem), match="500"):
            await ask(stranger.base_url)
        assert _KEY in stranger.got()


def test_a_connection_that_was_not_accepted_is_its_listeners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before somebody accepts it, the kernel has no process for the other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr("os.geteuid", lambda: 4321)
        with pytest.raises(ClientError) as raised:
            run_plain(PlainClient(base_url, api_key=_KEY, within_s=0.2).healthz())
        # It is root's.
        assert not isinstance(raised.value, Unreachable)
