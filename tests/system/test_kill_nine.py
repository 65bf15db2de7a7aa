"""`kill -9` of the daemon at twenty random moments, while VMs are created, started, stopped and deleted.

Afterwards nothing acknowledged is lost, nothing without an owner is left, and clients that resume have received each
event and each line once. The end of a guest without a daemon is reported correctly.

A seed decides the moments and the operators' actions. The test prints it; `VOLANT_TEST_SEED` repeats it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import httpx
import trio

from tests.ports import free_port
from tests.system.kit import BOOT_S, Daemon, adopted, boot, is_alive, load, reachable, run
from volant.client import Client, ClientError, ClientProblem, LogLine
from volant.model import TRANSITIONS, CreateVm, Status, VmView

KILLS = load("VOLANT_TEST_KILLS", usual=5, full=60)
SEED = int(os.environ.get("VOLANT_TEST_SEED") or SystemRandom().randrange(10**6))

TICKER = """
import time
console = open("/dev/console", "w", buffering=1)
number = 0
while True:
    print("tick", number, flush=True)
    print("tock", number, file=console)
    number += 1
    time.sleep(0.05)
"""
MANIFEST = {"name": "ticker", "workload": {"entrypoint": ["python3.13", "-c", TICKER]}}


class EventReader:
    """Reads all events and reconnects as `EventSource` does. A gap or a repeated event is a failure."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.events: list[dict[str, Any]] = []
        self.last_id = ""
        self.resumed = 0

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
            except httpx.TransportError:
                pass
            await trio.sleep(0.05)

    async def _follow(self) -> None:
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        async with (
            httpx.AsyncClient(base_url=self._daemon.base_url, trust_env=False, timeout=30) as http,
            http.stream("GET", "/api/v1/events/vms?since=0", headers=headers) as answer,
        ):
            if answer.status_code == 503:
                return
            assert answer.status_code == 200
            self.resumed += 1
            block: dict[str, str] = {}
            # Ignore a truncated block.
            async for line in answer.aiter_lines():
                if line:
                    name, _, value = line.partition(": ")
                    block[name] = value
                else:
                    self._take(block)
                    block = {}

    def _take(self, block: dict[str, str]) -> None:
        if "data" not in block:
            assert block.get("id", self.last_id) == self.last_id, block
            return
        event = json.loads(block["data"])
        assert event["type"] != "STREAM_GAP", event
        epoch, _, seq = event["id"].rpartition("-")
        last_epoch, _, last_seq = self.last_id.rpartition("-")
        assert (last_epoch or epoch, int(last_seq or 0) + 1) == (epoch, int(seq)), (self.last_id, event["id"])
        self.last_id = event["id"]
        self.events.append(event)

    def check(self, vms: list[VmView], acknowledged: dict[int, str], deleted: set[int]) -> None:
        """Checks that each VM's events are legal, end in its present state, and include all acknowledged ones."""
        statuses: dict[int, Status | None] = {}
        for event in self.events:
            if event["type"].startswith("WORKLOAD_"):
                continue
            transition = (statuses.get(event["vm_id"]), Status(event["status"]) if event["status"] else None)
            assert transition in TRANSITIONS, event
            statuses[event["vm_id"]] = transition[1]
        assert {vm.id: vm.status for vm in vms} == {vm: status for vm, status in statuses.items() if status is not None}
        created = [event["vm_id"] for event in self.events if event["type"] == "VM_CREATED"]
        assert len(created) == len(set(created))
        assert set(acknowledged) <= set(created)
        assert deleted <= {event["vm_id"] for event in self.events if event["type"] == "VM_DELETED"}


class LogReader:
    """Reads a VM's whole log and reconnects, as `volant.client` does."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self._daemon = daemon
        self._name = name
        self._seq = 0
        self.numbers: dict[str, list[int]] = {"tick": [], "tock": []}
        self.lost = 0
        self.connected = trio.Event()

    async def run(self) -> None:
        async with (
            self._daemon.client() as client,
            # As long as guests take to end while there is no daemon.
            client.vms.logs(self._name, since=0, patience_s=3 * BOOT_S, on_retry=self._retry) as feed,
        ):
            self.connected.set()
            async for line in feed:
                assert isinstance(line, LogLine), line
                assert line.seq == self._seq + 1, (line, self._seq)
                self._seq = line.seq
                word, _, number = line.line.partition(" ")
                if word in self.numbers and number.isdecimal():
                    assert line.stream == ("stdout" if word == "tick" else "console")
                    self.numbers[word].append(int(number))

    def _retry(self, error: object, delay_s: float) -> None:
        self.lost += 1


@dataclass
class Known:
    """The possible states of a VM after the acknowledged requests."""

    exists: set[bool] = field(default_factory=lambda: {False})
    vm_id: int | None = None


class Operator:
    """A user with their own VMs, who retries each request until it is answered."""

    def __init__(self, daemon: Daemon, rng: Random, names: list[str]) -> None:
        self._daemon = daemon
        self._rng = rng
        self.known = {name: Known() for name in names}
        self.created: dict[int, str] = {}
        self.deleted: set[int] = set()
        self.commands = 0

    async def run(self, over: trio.Event) -> None:
        while not over.is_set():
            name = self._rng.choice(sorted(self.known))
            if self.known[name].exists == {False}:
                await self._create(name)
            elif self._rng.random() < 0.35:
                await self._delete(name)
            else:
                await self._command(name)
            await trio.sleep(self._rng.expovariate(1 / 0.4))

    async def _create(self, name: str) -> None:
        known = self.known[name]
        key = f"{name}-{self._rng.getrandbits(64):x}"
        # Some guests end by themselves at once.
        cmdline = self._rng.choice(["", "", "rdinit=/nonexistent"])
        request = CreateVm(name=name, cpu_cores=1, memory_mb=128, kernel_cmdline=cmdline)
        vm = await self._insist(lambda client: client.vms.create(request, idempotency_key=key))
        known.exists, known.vm_id = {True}, vm.id
        self.created[vm.id] = name

    async def _command(self, name: str) -> None:
        command = self._rng.choice(["start", "stop", "stop", "restart"])
        vm = await self._insist(
            lambda client: (
                client.vms.stop(name, grace_s=0)
                if command == "stop"
                else client.vms.start(name)
                if command == "start"
                else client.vms.restart(name)
            )
        )
        assert vm.id == self.known[name].vm_id
        self.commands += 1

    async def _delete(self, name: str) -> None:
        known = self.known[name]
        assert known.vm_id is not None
        try:
            await self._insist(lambda client: client.vms.delete(name))
        except ClientProblem as problem:
            # A request whose answer was lost has deleted it; otherwise there would be no event.
            if problem.status != 404:
                raise
        self.deleted.add(known.vm_id)
        known.exists, known.vm_id = {False}, None

    async def _insist(self, ask: Callable[[Client], Any]) -> Any:
        with trio.fail_after(180):
            while True:
                try:
                    async with self._daemon.client() as client:
                        return await ask(client)
                except ClientProblem as problem:
                    if problem.status not in (502, 503):
                        raise
                except ClientError:
                    pass
                await trio.sleep(self._rng.uniform(0.02, 0.2))

    def check(self, vms: dict[str, VmView]) -> None:
        for name, known in self.known.items():
            assert {name in vms} == known.exists, f"{name} is there: {name in vms}, acknowledged: {known.exists}"
            assert name not in vms or vms[name].id == known.vm_id, f"{name} is another VM"


def type_at(directory: Path, command: str) -> None:
    """Types a command at a guest's console, without a daemon."""
    fd = os.open(directory / "console.in", os.O_WRONLY | os.O_NONBLOCK)
    try:
        log = directory / "console.log"
        begin = log.stat().st_size
        # The first line wakes up the shell.
        while b"# " not in log.read_bytes()[begin:]:
            os.write(fd, b"\r")
            time.sleep(0.2)
        os.write(fd, command.encode() + b"\r")
    finally:
        os.close(fd)


def wait_for_end(directory: Path) -> str:
    """Asks QEMU, without a daemon, until the guest has ended; returns QEMU's status."""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(BOOT_S)
        control.connect(str(directory / "qmp.sock"))
        lines = control.makefile("rwb", buffering=0)
        lines.write(b'{"execute":"qmp_capabilities"}{"execute":"query-status"}\n')
        for line in lines:
            message = json.loads(line)
            status = message.get("return", {}).get("status")
            if status is not None and status != "running":
                return str(status)
            if message.get("event") == "STOP":
                lines.write(b'{"execute":"query-status"}\n')
    raise AssertionError("QEMU has left")


async def test_kills_lose_nothing_leave_nothing_and_repeat_nothing(make_daemon: Callable[..., Daemon]) -> None:
    print(f"VOLANT_TEST_SEED={SEED}")
    rng = Random(SEED)
    daemon = make_daemon("--listen", f"127.0.0.1:{free_port()}", ephemeral=False)
    operators = [
        Operator(daemon, Random(rng.getrandbits(64)), [f"{name}-{n}" for n in range(2)]) for name in ("ada", "bob")
    ]
    events, log = EventReader(daemon), LogReader(daemon, "steady")
    over = trio.Event()
    async with daemon.client() as client:
        await client.plugins.install(MANIFEST)
        steady = await boot(client, "steady", plugin="ticker")
        quitter, panicker = await boot(client, "quitter"), await boot(client, "panicker")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.run)
        nursery.start_soon(log.run)
        # A daemon that can't be reached at the first attempt is not waited for.
        await log.connected.wait()
        async with trio.open_nursery() as people:
            for operator in operators:
                people.start_soon(operator.run, over)
            ends_at = rng.randrange(KILLS)
            for kill in range(KILLS):
                await trio.sleep(rng.uniform(0.0, 1.5))
                daemon.kill()
                if kill == ends_at:
                    await trio.to_thread.run_sync(end_guests, daemon, quitter, panicker)
                if rng.random() < 0.3:
                    # Kill it again before it has started, or while it adopts.
                    daemon.launch()
                    await trio.sleep(rng.uniform(0.0, 1.5))
                    daemon.kill()
                await trio.to_thread.run_sync(daemon.start)
            over.set()
        async with daemon.client() as client:
            await adopted(client)
            vms = await at_rest(client)
            newest = await client.newest_event()
            ticks = len(log.numbers["tick"])
            with trio.fail_after(30):
                while events.last_id != newest or any(len(seen) < ticks + 5 for seen in log.numbers.values()):  # noqa: ASYNC110
                    await trio.sleep(0.05)
        nursery.cancel_scope.cancel()

    created = {vm_id: name for operator in operators for vm_id, name in operator.created.items()}
    print(
        f"{len(created)} VMs, {sum(operator.commands for operator in operators)} commands, {len(events.events)} events"
    )
    print(f"events resumed {events.resumed} times, the log lost {log.lost} times, {len(log.numbers['tick'])} lines")
    for operator in operators:
        operator.check(vms)
    events.check(list(vms.values()), created, {vm_id for operator in operators for vm_id in operator.deleted})
    for word, numbers in log.numbers.items():
        assert numbers == list(range(len(numbers))), f"{word}: a line is lost or there twice"
    assert events.resumed >= KILLS / 2
    assert log.lost >= KILLS / 2
    assert (vms["steady"].pid, vms["steady"].boots, vms["steady"].reason) == (steady.pid, 1, None)
    check_ends(vms)
    async with daemon.client() as client:
        await reachable(client, "steady")
        assert await run(client, "steady", "echo", "alive") == "alive\n"
        assert (await client.system.info())["orphans"] == []
    check_owners(daemon, list(vms.values()))
    # Deleted VMs leave no files; the fixture checks the rest.
    await trio.to_thread.run_sync(daemon.delete_vms)
    assert daemon.stop() == 0
    assert daemon.leftovers() == []


def end_guests(daemon: Daemon, quitter: VmView, panicker: VmView) -> None:
    """Lets one guest power off and one panic without a daemon."""
    ends = []
    for vm, command in ((quitter, "poweroff"), (panicker, "echo c >/proc/sysrq-trigger")):
        directory = daemon.runtime_dir / "vms" / str(vm.id)
        type_at(directory, command)
        ends.append(wait_for_end(directory))
        assert vm.pid is not None
        assert is_alive(vm.pid)
    assert ends == ["shutdown", "guest-panicked"]


async def at_rest(client: Client) -> dict[str, VmView]:
    """Returns all VMs once they are settled and the last boots have left nothing."""
    with trio.fail_after(2 * BOOT_S):
        while True:
            names = [vm.name for vm in await client.vms.list()]
            if not any([(await client.vms.inspect(name))["phase"] for name in names]):
                return {vm.name: vm for vm in await client.vms.list()}
            await trio.sleep(0.1)


def check_ends(vms: dict[str, VmView]) -> None:
    """Checks how the guests ended, and why."""
    quitter, panicker = vms["quitter"], vms["panicker"]
    assert (quitter.status, quitter.desired) == ("stopped", "stopped")
    assert quitter.reason is not None
    assert quitter.reason.code == "guest_shutdown"
    assert panicker.status == "crashed"
    assert panicker.reason is not None
    assert panicker.reason.code == "guest_panicked"
    assert any("sysrq" in line for line in panicker.reason.console)


def check_owners(daemon: Daemon, vms: list[VmView]) -> None:
    """Checks that every process, file and socket belongs to a VM with a process."""
    alive = [vm for vm in vms if vm.pid is not None]
    assert {vm.pid for vm in alive} == set(daemon.hypervisors())
    files = [daemon.runtime_dir / "vms" / str(vm.id) for vm in alive]
    # Clones share the memory of their template.
    files += [daemon.memory_dir / f"{vm.id}.mem" for vm in alive if vm.booted_from == "cold"]
    assert daemon.files() == sorted(map(str, files))
    addresses = [vm.ip_address for vm in vms if vm.ip_address]
    assert len(addresses) == len(set(addresses))
