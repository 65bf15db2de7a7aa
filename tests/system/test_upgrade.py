"""An upgrade loses no VM, event or line; guests with another agent work as far as their protocol allows."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import apsw
import httpx
import pytest
import trio

from tests.system.kit import (
    BOOT_S,
    REPOSITORY,
    Daemon,
    boot,
    next_event,
    reachable,
    run,
    run_cut_off,
    runs_on,
    spec,
    until,
)
from volant.client import Client, ClientProblem, LogLine
from volant.journal._schema import VERSION
from volant.model import ForkVm, RestoreVm, TakeSnapshot

PREVIOUS = os.environ.get("VOLANT_TEST_PREVIOUS") or "HEAD~1"
"""The commit of the previous version."""

TICKER = """
import time
number = 0
while True:
    print("tick", number, flush=True)
    number += 1
    time.sleep(0.1)
"""
KILL = "kill -9 $(pidof python3.13 | tr ' ' '\\n' | sort -n | grep -vx 1 | head -n 1); sleep 60"


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    """A checkout of the previous commit."""
    archive = subprocess.run(
        ["git", "-C", REPOSITORY, "archive", PREVIOUS, "volant", "actors"], capture_output=True, check=False
    )
    if archive.returncode != 0:
        pytest.skip(f"there is no {PREVIOUS} here: {archive.stderr.decode().strip()[:200]}")
    tree = tmp_path / "previous"
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(tree, filter="data")
    return tree


def begin_with(daemon: Daemon, tree: Path | None) -> None:
    """Makes the next start use the code in `tree`; None: this code."""
    daemon.cwd = tree
    daemon.environ["PYTHONPATH"] = str(tree or REPOSITORY)
    where = subprocess.run(
        [sys.executable, "-c", "import volant; print(volant.__file__)"],
        cwd=daemon.cwd, env=daemon.environ, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(where.strip()).is_relative_to(tree or REPOSITORY), where


async def test_the_next_version_takes_over_everything_from_the_previous_one(
    make_daemon: Callable[..., Daemon], previous: Path
) -> None:
    daemon = make_daemon(ephemeral=False)
    assert daemon.stop() == 0
    begin_with(daemon, previous)
    # It must not use files that this version has made.
    for path in daemon.state_dir.glob("volant.db*"):
        path.unlink()
    daemon.start()
    async with daemon.client() as client:
        await client.plugins.install({"name": "ticker", "workload": {"entrypoint": ["python3.13", "-c", TICKER]}})
        waited = await client.vms.create_and_wait(spec("demo", plugin="ticker", labels={"a": "b"}), timeout_s=BOOT_S)
        assert waited.vm is not None
        vm = waited.vm
        await boot(client, "idle")
        assert (await client.vms.apply_and_wait("idle", "stop", ["stopped"], grace_s=0)).outcome == "met"
        await boot(client, "still")
        assert (await client.vms.apply_and_wait("still", "pause", ["paused"])).outcome == "met"
        await run(client, "demo", "touch", "/run/before")
        await client.snapshots.take("demo", TakeSnapshot(name="before"))
        made = await client.vms.create(spec("once"), idempotency_key="made-once")
        await client.vms.delete("once")
        newest = await client.newest_event()
        last = await last_line(client, 0)
        before = (await client.vms.get("idle")).id
    daemon.kill()

    begin_with(daemon, None)
    async with daemon.started() as client:
        after = await runs_on(client, vm)
        assert (after.labels, after.plugin, after.started_at) == (vm.labels, vm.plugin, vm.started_at)
        # The log and the events continue without a gap, and adoption causes no event.
        await last_line(client, last)
        assert await client.newest_event() == newest
        async with client.events(after=newest) as feed:
            assert (await client.vms.apply_and_wait("idle", "start", ["running"], timeout_s=BOOT_S)).outcome == "met"
            event = await next_event(feed)
            assert (event.type, event.vm_id) == ("VM_STARTING", before)
            epoch, _, seq = newest.rpartition("-")
            assert event.id == f"{epoch}-{int(seq) + 1}"
        # A repeated request gets the stored response.
        assert (await client.vms.create(spec("once"), idempotency_key="made-once")).id == made.id
        assert [plugin.name for plugin in await client.plugins.list()] == ["base", "ticker"]
        # What the previous version has set aside goes on, and guests that it has started can be copied.
        assert (await client.vms.apply_and_wait("still", "resume", ["running"])).outcome == "met"
        assert await run(client, "still", "hostname") == "still\n"
        await client.vms.create_and_wait(RestoreVm(name="restored", from_snapshot="before"), timeout_s=BOOT_S)
        (forked,) = await client.vms.fork("demo", ForkVm())
        await until(client, forked.name, "running")
        for name in ("restored", forked.name):
            assert await run(client, name, "sh", "-c", "ls /run/before; hostname") == f"/run/before\n{name}\n"
        stopped = await client.vms.apply_and_wait("demo", "stop", ["stopped"], grace_s=60)
        assert stopped.outcome == "met"
    connection = apsw.Connection(str(daemon.state_dir / "volant.db"), flags=apsw.SQLITE_OPEN_READONLY)
    assert connection.pragma("user_version") == VERSION
    connection.close()


async def last_line(client: Client, after: int) -> int:
    """Reads some lines of the workload after `after`, without gaps or repetitions; returns the last number."""
    numbers: list[int] = []
    seq = after
    with trio.fail_after(60):
        async with client.vms.logs("demo", since=after, streams=["stdout"]) as log:
            while len(numbers) < 10:
                line = await log.receive()
                assert isinstance(line, LogLine), line
                numbers.append(int(line.line.removeprefix("tick ")))
                seq = line.seq
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert after or numbers[0] == 0
    return seq


def older(source: str) -> str:
    """Returns the agent's server without its newer routes."""
    for route in ("agent.FILES", "agent.EXEC_SESSIONS", "agent.DAEMON_MANIFEST"):
        assert route in source
        source = source.replace(route, '"/v1/there-is-none"')
    allowed = 'agent.EXEC: (("POST", "GET"),'
    for newest in ("agent.PROTOCOL_VERSION", allowed):
        assert newest in source
    source = source.replace("agent.PROTOCOL_VERSION", "1")
    return source.replace(allowed, 'agent.EXEC: (("POST",),')


def newer(source: str) -> str:
    """Returns an agent of a later version, which no longer supports this protocol."""
    said = '{"min": agent.PROTOCOL_MIN, "max": agent.PROTOCOL_VERSION}'
    assert said in source
    return source.replace(said, '{"min": 70, "max": 90}')


async def replace_agent(client: Client, name: str, source: str) -> None:
    """Replaces the agent in a guest: PID 1 starts the new one."""
    await run_cut_off(client, name, f"cp {source} /usr/lib/volant/volant/guest/_server.py; {KILL}")


async def test_a_guest_with_another_agent_works_as_far_as_its_protocol_allows(daemon: Daemon) -> None:
    source = (REPOSITORY / "volant" / "guest" / "_server.py").read_text()
    async with daemon.client() as client, daemon.http() as http:
        vm = await boot(client, "demo")
        for path, text in (("/tmp/older", older(source)), ("/tmp/newer", newer(source))):
            await client.vms.write_file("demo", path, text.encode())
        await replace_agent(client, "demo", "/tmp/older")
        await reachable(client, "demo")

        # Supported operations work; for others the error names the reason, instead of a missing file.
        assert await run(client, "demo", "echo", "alive") == "alive\n"
        agent = "/api/v1/vms/demo/agent"
        for answer in (await http.get(f"{agent}/v1/files/etc/passwd"), await http.get(f"{agent}/v1/exec/sessions")):
            check_refusal(answer, "agent-too-old")
        assert (await http.get(f"{agent}/v1/nothing")).status_code == 404
        with pytest.raises(ClientProblem) as refused:
            async with client.vms.exec_session("demo", ["true"]):
                pass
        assert (refused.value.status, "older" in str(refused.value)) == (502, True)
        inspected = await client.vms.inspect("demo")
        assert inspected["actor"]["actor"]["process"]["protocol"] == 1

        # A VM with an unsupported agent keeps running, and reports why its guest is unreachable.
        await replace_agent(client, "demo", "/tmp/newer")
        with trio.fail_after(30):
            while (answer := await http.get(f"{agent}/v1/info")).json().get("type", "").endswith("unreachable") or (  # noqa: ASYNC110
                answer.status_code == 200
            ):
                await trio.sleep(0.1)
        check_refusal(answer, "agent-incompatible")
        assert "70 to 90" in answer.json()["detail"]
        assert (await client.vms.get("demo")).pid == vm.pid
        assert (await client.vms.get("demo")).status == "running"

        # Follow the hint.
        again = await client.vms.apply_and_wait("demo", "restart", ["running"], grace_s=0, timeout_s=BOOT_S)
        assert again.outcome == "met"
        await until(client, "demo", "running")
        await reachable(client, "demo")
        assert (await http.get(f"{agent}/v1/files/etc/passwd")).status_code == 200


def check_refusal(answer: httpx.Response, kind: str) -> None:
    assert answer.status_code == 502, answer.text
    problem = answer.json()
    assert problem["type"] == f"urn:volant:error:{kind}"
    assert problem["hint"].startswith("`volar vms restart demo`")
