"""schemathesis: requests that fit the OpenAPI document, or almost do, are answered as the document says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.system.kit import REPOSITORY, Daemon, boot, load

# Otherwise the daemon would build a template for each number of processors.
pytestmark = pytest.mark.cold

EXAMPLES = load("VOLANT_TEST_EXAMPLES", usual=5, full=500)
"""Random requests for each operation, in addition to those that schemathesis derives from the document."""
PHASES = ("fuzzing", "coverage,fuzzing")[load("VOLANT_TEST_COVERAGE", usual=0, full=1)]
"""Coverage tries each limit of each value: some 6000 requests."""
REQUESTS = load("VOLANT_TEST_REQUESTS", usual=500, full=3000)
TIMEOUT_S = load("VOLANT_TEST_EXAMPLES_S", usual=900, full=3000)

# Answers any request, but the discovery requests of DevTools with 404.
SERVER = """
import json, socket, threading

def serve(sock):
    with sock, sock.makefile("rb") as stream:
        method, target, _ = stream.readline().decode("latin-1").split(" ", 2)
        length = 0
        while line := stream.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            length = int(value) if name.lower() == "content-length" else length
        stream.read(length)
        status = "404 Not Found" if target.startswith("/json") else "200 OK"
        body = b"" if method == "HEAD" else json.dumps({"method": method, "length": length}).encode()
        head = f"HTTP/1.1 {status}\\r\\nContent-Type: application/json\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
        sock.sendall(head.encode() + body)

def listen(port):
    listener = socket.create_server(("127.0.0.1", port), backlog=64)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

threading.Thread(target=listen, args=(9000,), daemon=True).start()
listen(8080)
"""
WEB = {
    "name": "web",
    "workload": {"entrypoint": ["python3.13", "-c", SERVER], "port": 8080},
    "actions": {"greet": {"path": "/greet"}},
    "devtools": {"port": 8080},
}

# A daemon without keys would require them as soon as a request has made one.
KEY = "schemathesis-is-an-administrator"
HERE = Path(__file__).parent / "schemathesis"
_LOGGED = re.compile(r" volant\.api\.request: \S+ (\S+) (\S+) (\d{3}|-) ")


async def test_each_request_is_answered_as_documented(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon(environ={"VOLANT_MAX_VMS": "2", "VOLANT_API_KEY": KEY})
    async with daemon.client() as client:
        await client.plugins.install(WEB)
        await boot(client, "demo", plugin="web")
        before = await client.vms.get("demo")
        with trio.fail_after(TIMEOUT_S):
            ended = await trio.run_process(
                [
                    str(Path(sys.executable).parent / "schemathesis"),
                    *("--config-file", str(HERE / "schemathesis.toml"), "run"),
                    *(f"{daemon.base_url}/openapi.json", "--phases", PHASES),
                    *("--max-examples", str(EXAMPLES), "--workers", "2", "--request-timeout", "20"),
                    *("--header", f"X-Volant-API-Key: {KEY}"),
                    *("--continue-on-failure", "--warnings", "off"),
                    *(() if os.environ.get("VOLANT_TEST_FULL") else ("--generation-deterministic",)),
                ],
                cwd=tmp_path,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{HERE}{os.pathsep}{REPOSITORY}",
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "VOLANT_API_KEY": KEY,
                },
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
        print(ended.stdout.decode(errors="replace")[-50_000:])
        assert ended.returncode == 0

        # The daemon's log agrees, and the guest still runs.
        log = daemon.log_path.read_text(errors="replace")
        answered = Counter(status for _, _, status in _LOGGED.findall(log))
        print(answered)
        assert sum(answered.values()) >= REQUESTS
        assert answered["500"] == 0
        assert not re.search(r" (ERROR|CRITICAL) |Traceback", log)
        after = await client.vms.get("demo")
        assert (after.status, after.pid) == ("running", before.pid)
        assert answered["200"] > 20 * EXAMPLES
