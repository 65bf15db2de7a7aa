"""A VM whose network is a process of its own: what a user of the host reaches, and nothing of the host's loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, run
from volant.client import Client

OUTSIDE = "198.51.100.1"
_S = 20.0
_IN_A_NAMESPACE = (
    "unshare", "--net", "--", "sh", "-c",
    "ip link set lo up && ip link add up0 type bridge && ip address add 198.51.100.1/24 dev up0 && ip link set up0 up "
    '&& ip route add default via 198.51.100.2 && exec "$@"', "sh",
)  # fmt: skip
_SERVE = "import http.server, sys; http.server.test(http.server.SimpleHTTPRequestHandler, bind=sys.argv[1], port=8000)"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root; CI is root"),
    pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed: .ci/system-packages network"),
]


class Behind:
    """The daemon, in a namespace that has an address besides loopback."""

    def __init__(self, daemon: Daemon, client: Client) -> None:
        self.daemon = daemon
        self.client = client

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.daemon.pid}/ns/net", "--", *command]

    @contextmanager
    def server(self, address: str, says: Path) -> Iterator[None]:
        """Serves a directory in the namespace."""
        command = self.inside("python3", "-u", "-c", _SERVE, address)
        process = subprocess.Popen(command, cwd=says, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            assert "Serving" in process.stdout.readline()
            yield
        finally:
            process.kill()
            process.communicate(timeout=_S)

    def passts(self) -> list[int]:
        return [pid for pid, mark in self.daemon.processes().items() if mark.startswith(f"{self.daemon.mark_prefix}n.")]


@pytest.fixture
async def behind(image_cache: Path) -> AsyncIterator[Behind]:
    daemon = Daemon(image_cache, wrapper=_IN_A_NAMESPACE)
    daemon.command += ["--listen", f"unix:{daemon.root}/api.sock"]
    try:
        daemon.start()
        async with Client(daemon.base_url) as client:
            yield Behind(daemon, client)
    finally:
        daemon.dispose()


async def test_it_reaches_what_a_user_reaches_and_is_reached_where_it_is_published(
    behind: Behind, tmp_path: Path
) -> None:
    client = behind.client
    (tmp_path / "word").write_text("from the world")
    with behind.server(OUTSIDE, tmp_path), behind.server("127.0.0.1", tmp_path):
        vm = await boot(client, "demo", network="user", ports=("8080:80",))
        assert (vm.network, vm.ip_address) == ("user", "10.0.2.15")
        fetch = ("wget", "-q", "-T", "5", "-O", "-")
        assert await run(client, "demo", *fetch, f"http://{OUTSIDE}:8000/word") == "from the world"
        # The daemon's own port is on the loopback, too.
        refused = await run(client, "demo", "sh", "-c", f"{' '.join(fetch)} http://10.0.2.2:8000/word || echo closed")
        assert refused.strip() == "closed"

        await run(
            client, "demo", "sh", "-c", "mkdir /tmp/w && echo from the guest >/tmp/w/word && httpd -p 80 -h /tmp/w"
        )
        ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/word', timeout=10).read().decode())"
        got = (await trio.run_process(behind.inside("python3", "-c", ask), capture_stdout=True)).stdout.decode()
        assert got.strip() == "from the guest"

        # One that dies is started again, and the hypervisor finds it.
        (first,) = behind.passts()
        os.kill(first, signal.SIGKILL)
        with trio.fail_after(60):
            again = f"until {' '.join(fetch)} http://{OUTSIDE}:8000/word; do sleep 0.2; done"
            assert await run(client, "demo", "sh", "-c", again) == "from the world"
        assert behind.passts() not in ([first], [])

        await client.vms.stop("demo")
        await client.vms.wait("demo", ("stopped",), timeout_s=60)
        assert behind.passts() == []


async def test_it_outlives_the_daemon_and_goes_with_its_vm(image_cache: Path) -> None:
    daemon = Daemon(image_cache, wrapper=_IN_A_NAMESPACE, ephemeral=False)
    daemon.command += ["--listen", f"unix:{daemon.root}/api.sock"]
    try:
        daemon.start()
        async with Client(daemon.base_url) as client:
            await boot(client, "demo", network="user")
            behind = Behind(daemon, client)
            before = behind.passts()
            assert len(before) == 1
            await client.vms.verb_and_wait("demo", "stop", ["stopped"])
            assert not behind.passts()
            assert "passt had ended" not in daemon.log(), "it ends with its hypervisor"
            await client.vms.verb_and_wait("demo", "start", ["running"], timeout_s=BOOT_S)
            before = behind.passts()
        daemon.kill()
        assert behind.passts() == before
        (hypervisor,) = daemon.hypervisors()
        os.kill(hypervisor, signal.SIGKILL)
        with trio.fail_after(_S):
            while behind.passts():  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.05)
    finally:
        if daemon.runs:
            daemon.kill()
        for pid in daemon.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(daemon.memory_dir, ignore_errors=True)
        shutil.rmtree(daemon.root, ignore_errors=True)
