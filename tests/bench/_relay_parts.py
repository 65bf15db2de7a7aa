"""The parts between a DevTools client and its browser, each in its own process, without a hypervisor.

    python -m tests.bench._relay_parts browser            # answers CDP commands, and sends bytes on request
    python -m tests.bench._relay_parts guest SOCKET       # the agent, behind a hypervisor's vsock socket
    python -m tests.bench._relay_parts daemon SOCKET PORT # the API, with a VM whose agent listens on SOCKET

Each prints its address, and serves until SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

import trio

from tests.api.kit import api
from tests.channel.kit import Hypervisor, VsockHost
from volant.channel import AgentClient, Vsock, open_channel
from volant.guest._server import Server
from volant.http import Limits

from ._browser import browser

VM = "demo"


def guest(path: str) -> None:
    """The real agent."""
    hypervisor = Hypervisor(Path(path))
    hypervisor.take = Server(lambda _: None).serve
    with hypervisor.listening():
        print(f"listening on unix:{path}", flush=True)
        signal.pause()


async def daemon(path: str, port: int) -> None:
    """The real API, channel and relays; the VM is a row without a hypervisor."""
    with (
        tempfile.TemporaryDirectory(prefix="vb") as state,
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
    ):
        async with (
            api(Path(state), limits=Limits()) as served,
            open_channel(VsockHost(Path(path)), Vsock(3)) as channel,
        ):
            client = AgentClient(channel)
            await served.client.post("/api/v1/plugins", json={"name": "browser", "devtools": {"port": port}})
            await served.crashed(VM, plugin="browser")
            served.reach(client)
            workload = {"entrypoint": ["sleep", "1000"], "port": port}
            await client.request_json("PUT", "/v1/daemon/workload", workload, timeout_s=30)
            print(f"listening on http://127.0.0.1:{served.server.port}", flush=True)
            async for _ in signals:
                break
            await client.request_json("PUT", "/v1/daemon/workload", None, timeout_s=30)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["browser"]:
            browser()
        case ["guest", path]:
            guest(path)
        case ["daemon", path, port]:
            trio.run(daemon, path, int(port))
        case _:
            sys.exit(__doc__)
