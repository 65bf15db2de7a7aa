"""Exec over WebSocket works for any client: Node's own talks to commands in a real guest."""

from __future__ import annotations

from tests.conformance.kit import Node
from tests.system.kit import BOOT_S, Daemon, boot


async def test_nodes_own_websocket(daemon: Daemon, node: Node) -> None:
    async with daemon.client() as client:
        await boot(client, "demo")
    url = daemon.base_url.replace("http", "ws", 1) + "/api/v1/vms/demo/agent/v1/exec"
    plain, tty, detached = node.run("exec.mjs", url, timeout_s=BOOT_S)
    clean = {"code": 1000, "clean": True}
    assert plain == {
        "close": clean,
        "last": {"exit_code": 3},
        "length": len("grüße ") + 200_000,
        "err": "err\n",
        "ends": [1, 2],
        "extensions": "",
    }
    assert tty == {"close": clean, "last": {"exit_code": 44}, "first": "20 70"}
    assert detached == {"close": clean, "texts": [{"exit_code": 0}], "out": "two\n"}
