"""A daemon on a simulated machine, and its clients.

The daemon is the real one, assembled by `volant.daemon`, from its API down to the driver of the hypervisor; only its
host is simulated. Clients speak ASGI to it, as the HTTP server below that uses real sockets.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from actors.testing import Simulation, allow_real, kill
from volant.daemon import Daemon, Settings
from volant.daemon._leftovers import evidence_of
from volant.journal import restore_offline
from volant.logs import VmLogs
from volant.vm import instance_of

from .calls import DaemonDied
from .databases import Databases
from .dns import SimDns
from .file_system import File
from .host import SimHost
from .images import SimImages
from .machine import Machine
from .network import SimNetwork

_RAM = Path("/run/volant-simulated")
_SHM = Path("/dev/shm")
_ARTIFACTS = Path("/boot/simulated")


class Unreachable(Exception):
    """There is no daemon, or it died before it answered: whether it handled the request is unknown."""


@dataclass
class Answer:
    """The answer to a request."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


class World:
    """A machine with a daemon and clients. `simulated_world` makes one."""

    def __init__(self, sim: Simulation, nursery: trio.Nursery, directory: Path, databases: Databases) -> None:
        self.sim = sim
        self.dns = SimDns()
        """The sockets of the present daemon."""
        self.machine = Machine(sim.rng, nursery, databases, in_ram=(_RAM, _SHM), on_disk=(directory,))
        self.settings = Settings(
            state_dir=directory,
            runtime_dir=_RAM,
            cache_dir=Path("/var/cache/volant-simulated"),
            accelerator="tcg",
            kernel=_ARTIFACTS / "vmlinux",
            initramfs=_ARTIFACTS / "initramfs",
            agent_timeout_s=60.0,
            # Fewer than there are VMs, whatever the machine.
            max_boots=2,
            templates="auto",
            network="none",
            # On the simulated disk, as its power can be cut.
            secrets_key_file=directory / "secrets.key",
        )
        self.starts = 0
        self._nursery = nursery
        self._databases = databases
        self._daemon: Daemon | None = None
        self._host: SimHost | None = None
        self._daemon_scope: trio.CancelScope | None = None
        self._ended = trio.Event()
        self._requests: trio.Nursery | None = None
        self._lay_out()

    def _lay_out(self) -> None:
        files = self.machine.files
        for path in (self.settings.state_dir, self.settings.cache_dir, _RAM, _SHM, _ARTIFACTS):
            files.mkdir(path)
        for name in ("vmlinux", "initramfs"):
            files.put(_ARTIFACTS / name, File(bytearray(b"x"), 1, b"x"))
        files.sync_directory(_ARTIFACTS)

    # The daemon

    @property
    def runs(self) -> bool:
        """Whether there is a daemon."""
        return self._daemon is not None

    @property
    def daemon(self) -> Daemon:
        """:raises Unreachable: none runs."""
        if self._daemon is None:
            raise Unreachable
        return self._daemon

    async def start_daemon(self) -> None:
        """Starts the daemon, and returns once its API is ready. Raises what keeps `volantd` from starting."""
        assert self._daemon is None
        self.starts += 1
        await self._nursery.start(self._run_daemon)

    async def _run_daemon(self, task_status: trio.TaskStatus[None]) -> None:
        host = self._host = SimHost(self.machine)
        self.dns = SimDns()
        for name in ("disks", "logs"):
            self.machine.files.mkdir(self.settings.state_dir / name)
        with allow_real("files", "randomness", "time"):
            daemon = Daemon(
                self.settings,
                [],
                host=host,
                network=SimNetwork(self.machine.links, host.calls.run),
                dns=self.dns,
                oci=SimImages(self.machine.registry, host.calls, self.settings.cache_dir),
            )
        self._ended = trio.Event()
        with trio.CancelScope() as self._daemon_scope:
            try:
                async with daemon.running(self.sim.rng) as nursery:
                    self._daemon, self._requests = daemon, nursery
                    task_status.started()
                    await trio.sleep_forever()
            except* DaemonDied:
                pass  # The clean-up of a dead daemon has no effect.
            finally:
                self._daemon = self._requests = None
                self._ended.set()

    async def kill_daemon(self) -> None:
        """`kill -9`."""
        daemon, host, scope = self.daemon, self._host, self._daemon_scope
        assert host is not None
        assert scope is not None
        assert daemon.system is not None
        self._daemon = None
        host.die()
        kill(daemon.system, "")
        scope.cancel()
        await self._ended.wait()
        self._databases.close_all()

    async def stop_daemon(self) -> None:
        """Stops the daemon as SIGTERM does, and waits for its end."""
        daemon, host, scope = self.daemon, self._host, self._daemon_scope
        assert scope is not None
        assert host is not None
        await daemon.drain()
        self._daemon = None
        scope.cancel()
        await self._ended.wait()
        host.die()

    async def restore(self, backup: Path) -> str:
        """Restores a backup while no daemon runs, as `volantd restore` does. Returns the new epoch of events.

        :raises Problem: see `restore_offline`. :raises OSError: the disk fails.
        """
        assert self._daemon is None
        host, state_dir = SimHost(self.machine), self.settings.state_dir
        try:
            evidence = await evidence_of(host, self.settings, VmLogs(host, state_dir / "logs"))
            with allow_real("files", "randomness", "time"):
                done = restore_offline(
                    host, state_dir / "volant.db", backup, evidence, instance_of(state_dir), replace=False
                )
        finally:
            host.die()
        return done.epoch

    async def power_cut(self) -> None:
        """Cuts the power of the machine and restores it. The daemon does not start by itself."""
        if self._daemon is not None:
            await self.kill_daemon()
        self.machine.power_cut()
        self._databases.power_cut(self.settings.state_dir)
        self.machine.files.mkdir(self.settings.state_dir)

    # Clients

    async def request(
        self, method: str, target: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Sends a request and returns its whole answer. :raises Unreachable: there is none."""
        answer = Answer()
        async with self.stream(method, target, body, headers) as stream:
            answer.status, answer.headers = stream.status, stream.headers
            while data := await stream.receive():
                answer.body += data
        return answer

    @asynccontextmanager
    async def stream(
        self, method: str, target: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Stream]:
        """Sends a request whose answer is read in pieces; the end of the block closes the connection."""
        self.daemon  # noqa: B018 - raises
        assert self._requests is not None
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        stream = Stream(data)
        self._requests.start_soon(stream.run, self.daemon, method, target, headers or {})
        try:
            await stream.head.wait()
            if not stream.status:
                raise Unreachable
            yield stream
        finally:
            stream.leave()


class Stream:
    """One exchange over ASGI."""

    def __init__(self, body: bytes) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.head = trio.Event()
        self._body = body
        self._left = trio.Event()
        self._put, self._take = trio.open_memory_channel[bytes](1)
        self._whole = False

    async def receive(self) -> bytes:
        """Returns the next piece; empty at the end. :raises Unreachable: the answer is incomplete."""
        try:
            return await self._take.receive()
        except trio.EndOfChannel:
            if not self._whole:
                raise Unreachable from None
            return b""

    def leave(self) -> None:
        self._left.set()
        self._take.close()

    async def run(self, daemon: Daemon, method: str, target: str, headers: Mapping[str, str]) -> None:
        """Runs the daemon's side of the exchange."""
        path, _, query = target.partition("?")
        given = {"host": "localhost", "x-request-id": "simulated", "content-length": str(len(self._body)), **headers}
        scope: Any = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 40000),
            "server": ("127.0.0.1", 7777),
            "state": {"stopping": daemon.stopping, "unix": False},
            "extensions": {},
        }
        sent = False

        async def receive() -> Any:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": self._body, "more_body": False}
            await self._left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
                self.status = message["status"]
                self.head.set()
            elif message["type"] == "http.response.body":
                try:
                    if message["body"]:
                        await self._put.send(message["body"])
                except trio.BrokenResourceError:
                    pass
                if not message.get("more_body", False):
                    self._whole = True
                    self._put.close()

        try:
            await daemon.app(scope, receive, send)
        except* DaemonDied:
            pass
        finally:
            self._put.close()
            self.head.set()


@asynccontextmanager
async def simulated_world(sim: Simulation, directory: Path) -> AsyncIterator[World]:
    """Makes a machine for the length of a block. `directory` is a real, empty directory for its database."""
    with Databases() as databases:
        async with trio.open_nursery() as nursery:
            world = World(sim, nursery, directory, databases)
            try:
                yield world
            finally:
                if world._daemon is not None:
                    await world.kill_daemon()
            nursery.cancel_scope.cancel()
