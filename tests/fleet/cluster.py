"""A cluster of real etcd members on the loopback interface."""

from __future__ import annotations

import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.certificates import Authority
from tests.ports import free_port
from tests.processes import ENDS_WITH_US
from volant.fleet import Etcd, EtcdError, EtcdSettings, open_etcd

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="needs Debian's etcd-server")
_READY_S = 60.0
_END_S = 20.0


class Member:
    """One member, which can be killed, stopped and started again with its data."""

    def __init__(self, command: list[str], url: str, log: Path) -> None:
        self.url = url
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(_END_S)
            self._process = None


class Cluster:
    """Members that have a quorum together."""

    def __init__(self, directory: Path, size: int, *, tls: bool = False) -> None:
        scheme = "https" if tls else "http"
        self.authority: Authority | None = None
        options: list[str] = []
        if tls:
            self.authority = Authority(directory)
            # The gateway is a client of its own member, with this certificate.
            pem = str(self.authority.issue("etcd.example", client=True, server=True))
            options = ["--cert-file", pem, "--key-file", pem, "--client-cert-auth"]
            options += ["--trusted-ca-file", str(self.authority.path)]
        peers = [f"m{number}=http://127.0.0.1:{free_port()}" for number in range(size)]
        self.members: list[Member] = []
        for number, peer in enumerate(peers):
            url, own = f"{scheme}://127.0.0.1:{free_port()}", peer.partition("=")[2]
            command = [
                *ENDS_WITH_US, "etcd", "--name", f"m{number}", "--data-dir", str(directory / f"m{number}"),
                "--listen-client-urls", url, "--advertise-client-urls", url,
                "--listen-peer-urls", own, "--initial-advertise-peer-urls", own,
                "--initial-cluster", ",".join(peers), "--initial-cluster-token", directory.name,
                # The promises under test do not depend on the disk, and a busy one would make elections.
                "--unsafe-no-fsync", "--logger", "zap", "--log-level", "error", *options,
            ]  # fmt: skip
            self.members.append(Member(command, url, directory / f"m{number}.log"))

    def settings(self, *, only: int | None = None, user: str = "", password: str = "") -> EtcdSettings:
        """Returns how to reach all members, or only one."""
        members = self.members if only is None else [self.members[only]]
        context = None
        if self.authority is not None:
            context = ssl.create_default_context(cafile=str(self.authority.path))
            context.load_cert_chain(self.authority.issue("host.example", client=True))
        return EtcdSettings(
            endpoints=tuple(member.url for member in members), context=context, user=user, password=password
        )

    async def ready(self) -> None:
        """Waits until the members have a leader."""
        with trio.fail_after(_READY_S):
            for number in range(len(self.members)):
                async with open_etcd(self.settings(only=number)) as etcd:
                    while not await _answers(etcd):  # noqa: ASYNC110 - of another process
                        await trio.sleep(0.05)


@contextmanager
def cluster(directory: Path, size: int = 1, *, tls: bool = False) -> Iterator[Cluster]:
    """Starts members; await `ready` before the first request."""
    found = Cluster(directory, size, tls=tls)
    try:
        for member in found.members:
            member.start()
        yield found
    finally:
        for member in found.members:
            member.kill()


async def administer(member: Member, path: str, **body: Any) -> None:
    """Sends a request that no host of a fleet sends."""
    async with httpx.AsyncClient(trust_env=False) as http:
        (await http.post(f"{member.url}/v3/{path}", json=body, timeout=30)).raise_for_status()


async def _answers(etcd: Etcd) -> bool:
    try:
        await etcd.get("ready")
    except EtcdError:
        return False
    return True
