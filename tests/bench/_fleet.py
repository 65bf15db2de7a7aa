"""Fakes many running VMs without a hypervisor, which a real daemon on the real host adopts.

A host has memory for some dozens of emulated guests, and a benchmark needs a thousand. The fake of a QEMU is a waiting
shell with the process tag on its command line. One process serves all their sockets: it speaks QMP, and has the agent
of the simulated guest (`tests.simulated`) on each port. The rows come from `decide` and the journal. The daemon is
unmodified: it reads /proc, holds pidfds, and talks over Unix sockets.

`python -m tests.bench._fleet DIRECTORY MARKS` is the guests' process; DIRECTORY has one for each VM, by its id.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import trio

from actors import ONE_FOR_ONE, Child, Ref, Supervisor, open_system
from tests.simulated.guest import SimGuest, SimPort
from tests.system.kit import Daemon
from volant.host import Host
from volant.host._procfs import stat
from volant.hypervisor import MachineSpec
from volant.journal import CommitSteps, CreateRow, Journal, Store
from volant.model import (
    DEFAULT_PROJECT,
    AgentAnswered,
    CreateVm,
    ImageReady,
    Launched,
    ProcessIdentity,
    Seen,
    Woke,
    decide,
)
from volant.vm import VmSettings, instance_of
from volant.vm._layout import tag_of
from volant.vm._machine_spec import CUSTOM_IMAGE, machine_spec

from ._world import listening, start_program

_ASK_S = 60.0
_AT_ONCE = 32
_GREETING: dict[str, Any] = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 13}}}}


@asynccontextmanager
async def fleet(daemon: Daemon, count: int) -> AsyncIterator[None]:
    """Adds `count` running VMs to the state of a daemon that has not started yet, until the block ends."""
    host = Host()
    processes: list[subprocess.Popen[bytes]] = []
    for directory in (daemon.state_dir, daemon.runtime_dir):
        directory.mkdir(mode=0o700)
    store = Store(host, daemon.state_dir / "volant.db")
    child = Child("journal", lambda: Journal(store))
    try:
        async with open_system(Supervisor(ONE_FOR_ONE, intensity=1, period_s=60, children=[child])) as system:
            ref: Ref[Journal] = system["journal"]
            numbers = iter(range(count))

            async def make_some() -> None:
                for number in numbers:
                    await _make(daemon, host, ref, number, processes)

            async with trio.open_nursery() as nursery:
                for _ in range(_AT_ONCE):
                    nursery.start_soon(make_some)
        store.events.close()
        prefix = tag_of(instance_of(daemon.state_dir), store.projection.rows()[0]).rpartition("-")[0]
        with listening("tests.bench._fleet", str(daemon.runtime_dir / "vms"), prefix):
            yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


@asynccontextmanager
async def idle_daemon(count: int) -> AsyncIterator[Daemon]:
    """Gives a daemon that has not started yet, with `count` running VMs."""
    # No VM boots, so the cache is empty.
    daemon = Daemon(Path("/nonexistent"), ephemeral=False)
    daemon.command[daemon.command.index("--cache-dir") + 1] = str(daemon.root / "c")
    try:
        if count:
            async with fleet(daemon, count):
                yield daemon
        else:
            yield daemon
    finally:
        daemon.discard()


async def _make(
    daemon: Daemon, host: Host, journal: Ref[Journal], number: int, processes: list[subprocess.Popen[bytes]]
) -> None:
    request = CreateVm(name=f"vm{number}", cpu_cores=1, memory_mb=128)
    row = await journal.ask(CreateRow(request, DEFAULT_PROJECT), timeout_s=_ASK_S)
    settings = VmSettings(
        state_dir=daemon.state_dir,
        runtime_dir=daemon.runtime_dir,
        cache_dir=daemon.root / "c",
        memory_dir=daemon.memory_dir,
        disk_dir=daemon.state_dir / "disks",
        template_dir=daemon.state_dir / "templates",
        snapshot_dir=daemon.state_dir / "snapshots",
        volume_dir=daemon.state_dir / "volumes",
    )
    tag = tag_of(instance_of(daemon.state_dir), row)

    async def see(seen: Seen) -> None:
        nonlocal row
        steps = decide(row, seen, datetime.now(UTC))
        if steps:
            after = await journal.ask(CommitSteps(row.id, row.revision, steps), timeout_s=_ASK_S)
            assert after is not None
            row = after

    await see(Woke(None))
    spec = machine_spec(settings, row, "tcg")
    await see(ImageReady(CUSTOM_IMAGE, tag, str(spec.console_socket_path)))
    await host.files.mkdir(spec.directory)
    await host.files.make_fifo(spec.console_input_path)
    await host.files.write(spec.console_path, b"the guest says something\r\n")
    process = _wait_as_qemu(spec, tag)
    processes.append(process)
    identity = ProcessIdentity(
        pid=process.pid, start_time=stat(process.pid).start_time, boot_id=host.processes.boot_id(), tag=tag
    )
    await see(Launched(identity, "qemu", "tcg"))
    await see(AgentAnswered())


def _wait_as_qemu(spec: MachineSpec, tag: str) -> subprocess.Popen[bytes]:
    # Opening a pipe without a writer waits for ever.
    argv = ["sh", "-c", f"read line <{spec.console_input_path.name}", "qemu-system-x86_64", "-name", f"guest={tag}"]
    return start_program(argv, spec.directory, spec.log_path)


class _Guest:
    """Serves the sockets of one QEMU, for one daemon at a time."""

    def __init__(self, directory: Path, tag: str) -> None:
        self._directory = directory
        self._tag = tag
        self._guest = SimGuest(Random(tag), time.time_ns, lambda: None)
        self._guest.up.set()

    def listen(self, nursery: trio.Nursery) -> None:
        for name, serve in (("qmp.sock", self._control), ("agent.sock", self._agent)):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(self._directory / name))
            sock.listen(4)
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            nursery.start_soon(partial(trio.serve_listeners, serve, [listener]))

    async def _agent(self, stream: trio.SocketStream) -> None:
        await SimPort(self._guest, stream).run()

    async def _control(self, stream: trio.SocketStream) -> None:
        answers: dict[str, object] = {
            "qmp_capabilities": {},
            "query-status": {"status": "running", "running": True},
            "query-name": {"name": self._tag},
        }
        try:
            await stream.send_all(json.dumps(_GREETING).encode() + b"\r\n")
            buffer = b""
            while data := await stream.receive_some(4096):
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    said = json.loads(line)
                    answer = {"return": answers[said["execute"]], "id": said["id"]}
                    await stream.send_all(json.dumps(answer).encode() + b"\r\n")
        except trio.BrokenResourceError:
            pass  # the daemon was killed


async def _serve(directories: Sequence[Path], prefix: str) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            for directory in directories:
                _Guest(directory, f"{prefix}-{directory.name}.1").listen(nursery)
            print(f"listening on {len(directories)} ports", flush=True)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_serve, sorted(Path(sys.argv[1]).iterdir()), sys.argv[2])
