"""A simulated QEMU: it reads its command line, opens its sockets, speaks QMP, and runs a guest that may do anything.

It does what the daemon relies on: its sockets lie in its working directory and serve one client at a time, the guest's
console is appended to a file, and QEMU stays paused after its guest's end until a client has asked why.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from actors import fault
from volant.hypervisor import PAUSED
from volant.model.agent import PROTOCOL_VERSION, VOLUMES_SINCE

from .file_system import File, SocketName
from .guest import SimGuest, SimPort
from .listener import SimListener, hang_up
from .process import SimProcess
from .virtiofsd import HELLO

if TYPE_CHECKING:
    from .machine import Machine

_BOOT_S = (0.5, 6.0)
_CLONE_S = (0.02, 0.3)
_OF_GUEST = ("workload", "attached", "protocol", "secrets")
"""What a guest that is restored has of the one that was saved."""
_VERSION = {"qemu": {"major": 10, "minor": 0, "micro": 13}, "package": "Debian"}


class SimQemu:
    """A process of QEMU."""

    def __init__(self, machine: Machine, process: SimProcess, argv: Sequence[str], cwd: Path, output: Path) -> None:
        self.process = process
        self.waits_for_state = "-incoming" in argv
        self.status = "inmigrate" if self.waits_for_state else "running"
        """QEMU's run state."""
        self.migration: dict[str, str] = {}
        """The answer to `query-migrate`: empty before `migrate` and `migrate-incoming`."""
        self.frozen = False
        """Whether its process hangs, and answers nothing."""
        self.deaf_to: set[str] = set()
        """Commands that it does not even answer."""
        self.memory_file = Path(_option(argv, "mem-path"))
        self._machine = machine
        self.directory = cwd
        """Its working directory; renaming the directory changes this."""
        self._output = output
        self._rng = Random(machine.rng.getrandbits(64))
        self._clients: list[trio.abc.Stream] = []
        self._control: trio.abc.Stream | None = None
        self._sending = trio.Lock()
        self._boot = trio.CancelScope()
        self._running = trio.Event()
        self._capabilities: set[str] = set()
        self._directories = [
            machine.on_the_way.pop(f"{cwd.name}.{number}", None)
            for number in range(sum(value.startswith("vhost-user-fs-") for value in argv))
        ]
        """Connections to the virtiofsd of its directories of the host."""
        self._handed: dict[str, trio.abc.Stream | None] = {}
        """Unused descriptors that came by `getfd`, by name; None for a tap."""
        self._connections: dict[str, trio.abc.Stream] = {}
        """Connections of `netdevs` to passt."""
        self.netdevs = {_id_of(value): "" for option, value in pairwise(argv) if option == "-netdev"}
        """Backends of network interfaces, by id, each with the id of the backend that a hub's port leads to, if any."""
        self.resized: dict[str, int] = {}
        """New sizes of disks in bytes, by their block nodes."""
        self._is_stuck = False
        """Whether the agent's port passes nothing on for good, see `_listening` of the driver for QEMU."""
        self._runs_once_loaded = False
        """`cont` came before the state was loaded."""
        self.guest = SimGuest(self._rng, machine.wall_clock_ns, self._guest_powers_off)
        if any("node-name=root-layer-file" in argument for argument in process.argv):
            self.guest.root = "mounted"
        if any("serial=vol-" in argument for argument in process.argv):
            # One that is too old for volumes would fail each boot.
            self.guest.protocol = max(self.guest.protocol, VOLUMES_SINCE)
        if machine.has_new_agents:
            self.guest.protocol = PROTOCOL_VERSION

    @property
    def tag(self) -> str:
        return self.process.identity.tag

    async def run(self) -> None:
        """Runs the process until it ends."""
        with trio.CancelScope() as scope:
            self.process.on_end = scope.cancel
            try:
                await self._run()
            finally:
                for stream in (
                    *(*self._clients, *self._connections.values(), *self._handed.values()),
                    *self._directories,
                ):
                    if stream is not None:
                        hang_up(stream)

    async def _run(self) -> None:
        await trio.sleep(self._rng.uniform(0.01, 0.2))
        if fault("qemu.exits_at_start"):
            self._machine.files.append(self._output, b"qemu-system-x86_64: could not set up guest memory\n")
            self.process.end(1)
            await trio.sleep_forever()
        if fault("qemu.hangs_at_start"):
            await trio.sleep_forever()
        for directory in self._directories:
            await self._greet(directory)
        control, agent = SimListener(), SimListener()
        self._machine.files.put(self.directory / "agent.sock", SocketName(agent))
        self._machine.files.put(self.directory / "qmp.sock", SocketName(control))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_control, control)
                nursery.start_soon(self._serve_agent, agent)
                nursery.start_soon(self._run_guest)
                nursery.start_soon(self.guest.go_down)
                nursery.start_soon(self._misbehave)
        finally:
            control.close()
            agent.close()

    async def _greet(self, directory: trio.abc.Stream | None) -> None:
        """Waits until the virtiofsd of a directory answers, as QEMU does before it opens its sockets."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            if directory is not None:
                await directory.send_all(HELLO)
                if await directory.receive_some(len(HELLO)):
                    return
        self._machine.files.append(self._output, b"-device vhost-user-fs-pci: vhost_backend_init failed\n")
        self.process.end(1)
        await trio.sleep_forever()

    def freeze(self) -> None:
        """From now on, it executes nothing."""
        self.frozen = True
        self.guest.pause()

    # The guest

    async def _run_guest(self) -> None:
        with self._boot:
            if self.waits_for_state:
                await self._running.wait()
                await trio.sleep(self._rng.uniform(*_CLONE_S))
                await self.guest.wait_running()
                if fault("guest.never_answers"):
                    await trio.sleep_forever()
                self.guest.up.set()
                self.say("the clone runs")
                await self.guest.run_workload()
            self.say("booting")
            await trio.sleep(self._rng.uniform(*_BOOT_S))
            await self.guest.wait_running()
            if fault("guest.panics_at_boot"):
                self.say("Kernel panic - not syncing: no init found")
                self._guest_stops("guest-panicked", "GUEST_PANICKED", {"action": "pause"})
            if fault("guest.never_answers"):
                await trio.sleep_forever()
            self.guest.up.set()
            self.say("the agent runs")
            await self.guest.run_workload()

    async def _misbehave(self) -> None:
        """Causes faults now and then."""
        while True:
            await trio.sleep(self._rng.uniform(5.0, 30.0))
            if self.status == "running" and self.guest.up.is_set():
                if fault("guest.panics"):
                    self.say("Kernel panic - not syncing: sysrq triggered crash")
                    self._guest_stops("guest-panicked", "GUEST_PANICKED", {"action": "pause"})
                elif fault("guest.powers_off"):
                    self._guest_powers_off()
                elif fault("guest.reboots"):
                    self._guest_stops("shutdown", "SHUTDOWN", {"guest": True, "reason": "guest-reset"})
                elif fault("agent.restarts"):
                    self.guest.restart_agent()
                    self.cut_channel()
            if self.status == "paused" and self.directory.parent.name == "standby" and fault("standby.dies"):
                self.process.end(-9)
            if fault("qemu.dies"):
                self.process.end(-9 if self._rng.random() < 0.5 else 1)
            elif fault("qemu.loses_control") and self._control is not None:
                hang_up(self._control)
            elif fault("channel.is_cut"):
                self.cut_channel()

    def cut_channel(self) -> None:
        """Breaks the connections to the agent."""
        for stream in self._clients:
            if stream is not self._control:
                hang_up(stream)

    def _guest_powers_off(self) -> None:
        self._guest_stops("shutdown", "SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})

    def _guest_stops(self, status: str, event: str, data: dict[str, Any]) -> None:
        if self.status == "running":
            self.status = status
            self.guest.up = trio.Event()
            self._boot.cancel()
            self.cut_channel()
            self._machine.nursery.start_soon(self._send_event, {"event": event, "data": data})
            self._machine.nursery.start_soon(self._send_event, {"event": "STOP"})

    def say(self, line: str) -> None:
        """Writes a line to the serial console."""
        self._machine.files.append(self.directory / "console.log", f"{line}\r\n".encode())

    # Sockets

    async def _serve_agent(self, listener: SimListener) -> None:
        while True:
            stream = await listener.accept()
            self._clients.append(stream)
            if self._is_stuck:
                await self._wait_for_end(stream)
            else:
                await SimPort(self.guest, stream).run()
            hang_up(stream)
            self._clients.remove(stream)

    async def _wait_for_end(self, stream: trio.abc.Stream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await stream.receive_some(65536):
                pass

    async def _serve_control(self, listener: SimListener) -> None:
        while True:
            stream = self._control = await listener.accept()
            self._clients.append(stream)
            try:
                await self._converse(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            self._control = None
            hang_up(stream)
            self._clients.remove(stream)

    async def _converse(self, stream: trio.abc.Stream) -> None:
        await self._send(stream, {"QMP": {"version": _VERSION}})
        buffer = b""
        while data := await stream.receive_some(4096):
            buffer += data
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                if self.frozen or fault("qemu.ignores_a_command"):
                    continue
                if fault("qemu.is_slow"):
                    await trio.sleep(self._rng.uniform(0.1, 20.0))
                message = json.loads(line)
                if message["execute"] in self.deaf_to:
                    continue
                if message["execute"] in ("stop", "cont") and fault(f"qemu.refuses_{message['execute']}"):
                    refusal = {"class": "GenericError", "desc": "a device is busy"}
                    await self._send(stream, {"error": refusal, "id": message["id"]})
                    continue
                await self._obey(stream, message)

    async def _obey(self, stream: trio.abc.Stream, message: dict[str, Any]) -> None:
        command = message["execute"]
        if command == "xen-save-devices-state":
            await self._send(stream, {**await self._save_devices(message["arguments"]), "id": message["id"]})
            return
        refusal = self._refusal(command, message.get("arguments", {}))
        if refusal:
            await self._send(stream, {"error": {"class": "GenericError", "desc": refusal}, "id": message["id"]})
            return
        answers: dict[str, Any] = {
            "qmp_capabilities": {},
            "query-status": {"status": self.status, "running": self.status == "running"},
            "query-name": {"name": self.tag},
            "query-version": _VERSION,
            "quit": {},
            "stop": {},
            "cont": {},
            "migrate-set-capabilities": {},
            "migrate-set-parameters": {},
            "getfd": {},
            "netdev_add": {},
            "netdev_del": {},
            "migrate": {},
            "block_resize": {},
            "block_set_io_throttle": {},
            "migrate-incoming": {},
            "query-chardev": [{"label": "agent", "filename": self._agent_chardev()}],
            "query-migrate": self.migration,
            "qom-get": "pc-q35-10.0-machine",
        }
        self._change_netdevs(command, message.get("arguments", {}))
        answer = {"return": answers[command]} if command in answers else {"error": {"desc": f"no command {command}"}}
        await self._send(stream, {**answer, "id": message["id"]})
        match command:
            case "quit":
                self.process.end(0)
            case "stop" if self.status == "running":
                self.status = "paused"
                self.guest.pause()
                await self._send_event({"event": "STOP"})
            case "cont" if self.status in PAUSED and fault("qemu.dies_as_it_goes_on"):
                self.process.end(-9)
            case "cont" if self.status in PAUSED:
                await self._continue()
            case "cont" if self.status == "inmigrate":
                self._runs_once_loaded = True
            case "migrate-set-capabilities":
                for each in message["arguments"]["capabilities"]:
                    (self._capabilities.add if each["state"] else self._capabilities.discard)(each["capability"])
            case "block_resize":
                self.resized[message["arguments"]["node-name"]] = message["arguments"]["size"]
            case "migrate":
                await self._save(Path(message["arguments"]["uri"].removeprefix("file:")))
            case "migrate-incoming":
                # It loads in the background, whether or not the client stays.
                self.migration = {"status": "active"}
                path = Path(message["arguments"]["uri"].removeprefix("file:"))
                self._machine.nursery.start_soon(self._load, path)

    def _change_netdevs(self, command: str, arguments: dict[str, Any]) -> None:
        gone: trio.abc.Stream | None = None
        match command:
            case "getfd":
                gone = self._handed.get(arguments["fdname"])
                self._handed[arguments["fdname"]] = self._machine.on_the_way.pop(self.directory.name, None)
            case "netdev_add":
                self.netdevs[arguments["id"]] = arguments.get("netdev", "")
                connection = self._handed.pop(arguments.get("fd", ""), None)
                if connection is not None:
                    self._connections[arguments["id"]] = connection
            case "netdev_del":
                del self.netdevs[arguments["id"]]
                gone = self._connections.pop(arguments["id"], None)
        if gone is not None:
            hang_up(gone)

    def _refusal(self, command: str, arguments: dict[str, Any]) -> str | None:
        """Returns why QEMU refuses a command in its current state; None if it does not."""
        match command:
            case "migrate-incoming" if not self.waits_for_state:
                return "'-incoming' was not specified on the command line"
            case "migrate-incoming" if self.migration:
                return "The incoming migration has already been started"
            case "migrate-set-capabilities" if self.migration.get("status") == "active":
                return "There's a migration process in progress"
            case "netdev_del" if arguments["id"] not in self.netdevs:
                return f"Device '{arguments['id']}' not found"
            case "netdev_add" if arguments["id"] in self.netdevs:
                return f"Duplicate ID '{arguments['id']}' for netdev"
            case "netdev_add" if "fd" in arguments and arguments["fd"] not in self._handed:
                return f"File descriptor named '{arguments['fd']}' has not been found"
            case "netdev_add" if arguments.get("netdev", "") not in {"", *self.netdevs}:
                return f"netdev '{arguments['netdev']}' not found"
            case "netdev_add" if arguments.get("netdev", "") in set(self.netdevs.values()) - {""}:
                return f"netdev '{arguments['netdev']}' already in use"
        return None

    async def _continue(self) -> None:
        self.status = "running"
        self._running.set()
        self.guest.resume()
        await self._send_event({"event": "RESUME"})

    def _agent_chardev(self) -> str:
        return "unix:agent.sock,server=on" if self._has_peer() else "disconnected:unix:agent.sock,server=on"

    def _has_peer(self) -> bool:
        """Whether somebody is connected to the agent's port."""
        return any(stream is not self._control for stream in self._clients)

    async def _save_devices(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Saves the devices of a paused machine, for a checkpoint."""
        assert self.status in PAUSED, self.status
        await trio.sleep(self._rng.uniform(0.001, 0.02))
        if fault("qemu.fails_to_save"):
            return {"error": {"class": "GenericError", "desc": "saving Xen device state failed"}}
        try:
            self._write_state(Path(arguments["filename"]), b"QEVM\0\0\0\3")
        except OSError as error:
            # The client did not wait, and has removed the directory.
            return {"error": {"class": "GenericError", "desc": f"could not open the file: {error}"}}
        return {"return": {}}

    def _write_state(self, path: Path, head: bytes = b"") -> None:
        saved = {name: getattr(self.guest, name) for name in _OF_GUEST}
        is_full = self._has_peer() and fault("qemu.agent_port_is_full")
        state = head + json.dumps({**saved, "port_is_full": is_full}).encode()
        self._machine.files.put(path, File(bytearray(state), len(state)))

    async def _save(self, path: Path) -> None:
        await trio.sleep(self._rng.uniform(0.01, 0.1))
        saved = not fault("qemu.fails_to_save")
        if saved:
            try:
                self._write_state(path)
            except OSError:
                saved = False
        if saved:
            self.status = "postmigrate"
        self.migration = {"status": "completed"} if saved else {"status": "failed", "error-desc": "the disk is full"}
        await self._send_event({"event": "MIGRATION", "data": {"status": self.migration["status"]}})

    async def _load(self, path: Path) -> None:
        await trio.sleep(self._rng.uniform(0.01, 0.1))
        if not self.process.alive or self.frozen:
            return
        state, memory = self._machine.files.find(path), self._machine.files.find(self.memory_file)
        fits = isinstance(memory, File) and "x-ignore-shared" in self._capabilities
        if not isinstance(state, File) or not fits or fault("qemu.refuses_template"):
            self._machine.files.append(
                self._output, b"qemu-system-x86_64: load of migration failed: Invalid argument\n"
            )
            self.process.end(1)
            return
        text = state.data.decode("latin-1")
        saved, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
        for name in _OF_GUEST:
            setattr(self.guest, name, saved[name])
        self._is_stuck = saved["port_is_full"] and not self._has_peer()
        self.guest.is_copy = True
        self.status = "paused"
        self.migration = {"status": "completed"}
        await self._send_event({"event": "MIGRATION", "data": {"status": "completed"}})
        if self._runs_once_loaded:
            await self._continue()

    async def _send_event(self, message: dict[str, Any]) -> None:
        if self._control is not None:
            try:
                await self._send(self._control, message)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    async def _send(self, stream: trio.abc.Stream, message: dict[str, Any]) -> None:
        async with self._sending:
            await stream.send_all(json.dumps(message).encode() + b"\r\n")

    def ram_in_use(self) -> File | None:
        """Returns the guest's memory file, if it still has its name."""
        node = self._machine.files.find(self.memory_file)
        return node if isinstance(node, File) else None


def _id_of(netdev: str) -> str:
    """Returns the id in a value of `-netdev`."""
    return next(part.partition("=")[2] for part in netdev.split(",") if part.startswith("id="))


def _option(argv: Sequence[str], name: str) -> str:
    for argument in argv:
        for part in argument.split(","):
            if part.startswith(f"{name}="):
                return part.partition("=")[2]
    raise ValueError(f"no {name} on the command line {argv}")
