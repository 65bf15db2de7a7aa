"""The output of commands in a guest is correct byte for byte, even if it is large or many run at once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import trio

from tests.system.kit import REPOSITORY, Daemon, run, shared_vm

_ZEROS = hashlib.sha256(bytes(50_000_000)).hexdigest()


@pytest.fixture(scope="module")
def guest(module_daemon: Daemon) -> Iterator[str]:
    """The name of a running VM, which the tests of this module share."""
    with shared_vm(module_daemon):
        yield "demo"


async def volar(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Runs `volar`; does not check its exit code."""
    command = [sys.executable, "-m", "volant.cli.main", "--api", daemon.base_url, *arguments]
    with trio.fail_after(120):
        return await trio.run_process(
            command,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        )


async def test_volar_exec_returns_output_and_exit_code_of_the_command(daemon: Daemon, guest: str) -> None:
    done = await volar(
        daemon, "vms", "exec", guest, "--", "sh", "-c", "head -c 50000000 /dev/zero | sha256sum; echo e >&2; exit 7"
    )
    assert (done.returncode, done.stderr) == (7, b"e\n")
    assert done.stdout == f"{_ZEROS}  -\n".encode()


@pytest.mark.full
async def test_fifty_megabytes_arrive_unchanged(daemon: Daemon, guest: str) -> None:
    digest = hashlib.sha256()
    size = 0
    async with daemon.client() as client:
        script = "import os; [os.write(1, bytes([i % 251]) * 65536) for i in range(800)]"
        async with client.vms.exec(guest, ["python3.13", "-c", script], timeout_s=110) as process:
            async for piece in process:
                digest.update(piece.data)
                size += len(piece.data)
        assert process.end is not None
        assert process.end.exit_code == 0
    expected = hashlib.sha256()
    for i in range(800):
        expected.update(bytes([i % 251]) * 65536)
    assert (size, digest.digest()) == (800 * 65536, expected.digest())


async def test_twenty_commands_at_once_are_all_correct(daemon: Daemon, guest: str) -> None:
    answers: dict[int, str] = {}
    async with daemon.client() as client:

        async def one(i: int) -> None:
            script = f"head -c {100_000 + i} /dev/zero | sha256sum; echo {i}"
            answers[i] = await run(client, guest, "sh", "-c", script, timeout_s=100)

        async with trio.open_nursery() as nursery:
            for i in range(20):
                nursery.start_soon(one, i)
    assert answers == {i: f"{hashlib.sha256(bytes(100_000 + i)).hexdigest()}  -\n{i}\n" for i in range(20)}


async def test_a_command_that_nobody_reads_from_blocks_no_other(daemon: Daemon, guest: str) -> None:
    async with daemon.client() as client:
        async with client.vms.exec(guest, ["cat", "/dev/zero"]) as process:
            await anext(process)
            assert await run(client, guest, "echo", "free") == "free\n"
        # Leaving the block ends the command in the guest.
        script = "while pidof cat >/dev/null; do sleep 0.1; done"
        await run(client, guest, "sh", "-c", script, timeout_s=20)


async def test_a_command_that_cannot_run_is_reported(daemon: Daemon, guest: str) -> None:
    async with daemon.client() as client, client.vms.exec(guest, ["no-such-program"]) as process:
        end = await process.wait()
    assert (end.exit_code, end.code) == (None, "not_found")
    done = await volar(daemon, "vms", "exec", guest, "--", "no-such-program")
    assert done.returncode == 127


async def test_volar_prints_json(daemon: Daemon, guest: str) -> None:
    done = await volar(daemon, "--json", "vms", "get", guest)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == guest


async def test_a_command_that_takes_all_memory_dies_and_the_agent_does_not(daemon: Daemon, guest: str) -> None:
    async with daemon.client() as client:
        before = await client.vms.agent_health(guest)
        script = "a = []\nwhile True: a.append(bytearray(b'x' * (1 << 20)))"
        async with client.vms.exec(guest, ["python3.13", "-c", script], timeout_s=60) as process:
            end = await process.wait()
        print(end)
        assert end.signal == 9 or end.exit_code == 1
        # The same agent as before, not a restarted one.
        assert (await client.vms.agent_health(guest))["uptime_s"] > before["uptime_s"]
        assert (await client.vms.get(guest)).boots == 1
