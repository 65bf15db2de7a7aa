"""`volant.host.Host` on the simulated machine, for one life of the daemon.

The database is the one thing that is real (`_database.py`); its name is told by its suffix.

Every call takes a little time, before and after it has its effect, so that a daemon can be killed on either side of it.
A daemon that was killed has no effect any more: its calls raise. `finally` runs in a simulated death as it does not in
a real one, and this is what keeps that from mattering.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import apsw
import trio

from actors import check_fence, fault
from actors.testing import allow_real
from volant.host import Bounds, Host, HostFigures, ProcessGone, ProcessMemory, ProcessStatus, Sandbox, SandboxSupport
from volant.model import ProcessIdentity

from ._files import Directory, Fifo, File, SocketName, Watch
from ._machine import Machine
from ._processes import SimProcess, SimProcessHandle
from ._sockets import SimListener, hang_up

T = TypeVar("T")

_QEMU = "qemu-system-x86_64"
_IMG = "qemu-img"
_STUBBORN_S = 45.0
_QEMU_KB = 40 * 1024
"""Of a hypervisor, beside its guest's memory."""


class DaemonDied(Exception):
    """The daemon that makes this call was killed."""


class SimHost(Host):
    """One daemon's view of the machine."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine
        self._files = machine.files
        self._children: dict[int, Any] = {}
        self._alive = True
        self._listeners: list[SimListener] = []
        self._streams: list[trio.abc.Stream] = []

    def die(self) -> None:
        """The daemon was killed: the kernel closes what it had open."""
        self._alive = False
        self._files.forget_descriptors()
        for listener in self._listeners:
            listener.close()
        for stream in self._streams:
            hang_up(stream)

    def _check(self) -> None:
        if not self._alive:
            raise DaemonDied
        check_fence()

    async def _call(self, effect: Callable[[], T]) -> T:
        """A call that goes to the kernel in a thread: it takes a moment, its effect is whole, and it is not cancelled
        half-way."""
        self._check()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
            await trio.sleep(self._machine.rng.uniform(0.0, 0.002))
            self._check()
            value = effect()
            await trio.sleep(self._machine.rng.uniform(0.0, 0.002))
        self._check()
        return value

    async def call(self, effect: Callable[[], T]) -> T:
        """What another door of this daemon's does to the machine."""
        return await self._call(effect)

    def _write_may_fail(self, path: Path) -> None:
        if self._machine.disk_full or fault("disk.full"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    # Time and names

    def wall_clock(self) -> datetime:
        return self._machine.wall_clock()

    def new_id(self) -> str:
        return self._machine.new_id()

    def entropy(self, size: int) -> bytes:
        return self._machine.rng.randbytes(size)

    def boot_id(self) -> str:
        return self._machine.boot_id

    def monotonic(self) -> float:
        return trio.current_time()

    # Processes

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        tag: str,
        env: Mapping[str, str],
        cwd: Path,
        stdout_path: Path,
        sandbox: Sandbox | None = None,
        descriptors: Sequence[int] = (),
    ) -> ProcessIdentity:
        def start() -> ProcessIdentity:
            if fault("process.does_not_start"):
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), argv[0])
            assert any(tag in argument for argument in argv), (tag, argv)
            if self._files.find(stdout_path) is None:
                self._files.put(stdout_path, File())
            identity = self._machine.spawn(list(argv), tag, cwd, stdout_path)
            if fault("process.is_stubborn"):
                self._machine.processes[identity.pid].stubborn_s = _STUBBORN_S
            self._children[identity.pid] = identity
            return identity

        return await self._call(start)

    async def give_own_scope(self, identity: ProcessIdentity, description: str, bounds: Bounds | None = None) -> None:
        def move() -> None:
            process = self._machine.processes.get(identity.pid)
            if process is not None and process.alive:
                self._machine.groups[identity.tag] = identity.pid

        await self._call(move)

    async def remove_empty_scopes(self, ended: str | None = None) -> None:
        await self._call(self._machine.remove_empty_groups)

    def limits_of(self, identity: ProcessIdentity) -> dict[str, str] | None:
        return None

    def memory_events(self, identity: ProcessIdentity) -> Path | None:
        return None

    async def run_program(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        timeout_s: float,
        output_limit: int = 65536,
        until: bytes | None = None,
        stdin: bytes = b"",
    ) -> tuple[int, bytes]:
        def run() -> tuple[int, bytes]:
            if argv[0] == _QEMU and "--version" in argv:
                return 0, b"QEMU emulator version 10.0.13 (Debian)\n"
            if argv[0] == _QEMU and "help" in argv:
                return 0, b"Supported machines are:\nmicrovm  microvm\npc-q35-9.2  A PC\npc-q35-10.0  A PC\n"
            if argv[0] == "passt":
                self._machine.spawn_passt(list(argv))
                return 0, b""
            if argv[0] == "cp":
                self._copy(Path(argv[-2]), Path(argv[-1]))
                return 0, b""
            if argv[0] == _IMG:
                self._files.put(Path(argv[-1]), File())
                return 0, b""
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])

        return await self._call(run)

    async def find(self, tag: str) -> ProcessIdentity | None:
        found = [identity for identity in await self.processes(tag) if identity.tag == tag]
        return min(found, key=lambda identity: identity.start_time, default=None)

    async def processes(self, tag_prefix: str, *, of_anybody: bool = False) -> list[ProcessIdentity]:
        if not tag_prefix.startswith(self._own_tags):
            return []
        return await self._call(
            lambda: [
                process.identity for process in self._machine.living() if process.identity.tag.startswith(tag_prefix)
            ]
        )

    def is_of_ours(self, identity: ProcessIdentity) -> bool:
        return identity.tag.startswith(self._own_tags)

    def command_line(self, identity: ProcessIdentity) -> list[str]:
        with self.open_process(identity) as process:
            if process.exited:
                raise ProcessGone(f"process {identity.pid} has ended")
        return list(self._machine.processes[identity.pid].argv)

    async def process_memory(self, identity: ProcessIdentity, timeout_s: float) -> ProcessMemory:
        with self.open_process(identity) as process:
            await trio.sleep(self._machine.rng.uniform(0.0, 0.01))
            if process.exited:
                raise ProcessGone(f"process {identity.pid} has ended")
            ram = self._machine.qemus[identity.pid].ram_in_use()
            taken = _QEMU_KB + (0 if ram is None else ram.size // 1024)
            return ProcessMemory(rss_kb=taken, pss_kb=taken, private_kb=taken, shared_kb=0)

    def process_status(self, identity: ProcessIdentity) -> ProcessStatus:
        with self.open_process(identity) as process:
            if process.exited:
                raise ProcessGone(f"process {identity.pid} has ended")
        return ProcessStatus(user=os.geteuid(), capabilities=0, no_new_privileges=False, filters=0)

    def sandbox_support(self, directories: Sequence[Path]) -> SandboxSupport | None:
        return None

    def working_directory(self, identity: ProcessIdentity) -> Path:
        with self.open_process(identity) as process:
            if process.exited:
                raise ProcessGone(f"process {identity.pid} has ended")
        return self._machine.qemus[identity.pid].directory

    def open_process(self, identity: ProcessIdentity) -> Any:
        self._check()
        self.check_own(identity)
        process = self._machine.processes.get(identity.pid)
        child = self._children.get(identity.pid) == identity
        if identity.boot_id != self._machine.boot_id or process is None or process.identity != identity:
            raise ProcessGone(f"there is no process {identity.pid}")
        if not process.alive and not child:
            raise ProcessGone(f"process {identity.pid} has ended")
        return SimProcessHandle(process, self._signal, child=child)

    def _signal(self, process: SimProcess, signum: int) -> None:
        self._check()
        if process.alive:
            self._machine.signal(process, signum)

    # Sockets

    async def connect_unix(self, path: Path, timeout_s: float) -> Any:
        self._check()
        await trio.sleep(self._machine.rng.uniform(0.0, 0.005))
        self._check()
        node = self._files.get(path)
        if not isinstance(node, SocketName) or node.listening is None or fault("socket.refuses"):
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED), str(path))
        stream = node.listening.connect()
        self._streams.append(stream)
        return stream

    async def open_connection(self, path: Path, timeout_s: float) -> AbstractContextManager[int]:
        stream = await self.connect_unix(path, timeout_s)
        self._streams.remove(stream)
        on_the_way = self._machine.on_the_way

        @contextmanager
        def block() -> Iterator[int]:
            on_the_way[path.stem] = stream
            try:
                yield -1
            finally:
                # What the hypervisor has taken stays open.
                if on_the_way.get(path.stem) is stream:
                    hang_up(on_the_way.pop(path.stem))

        return block()

    @contextmanager
    def open_tap(self, name: str) -> Iterator[int]:
        self._check()
        yield -1

    def listen_unix(self, path: Path, *, mode: int = 0o600, backlog: int = 16) -> Any:
        self._check()
        listener = SimListener()
        if self._files.find(path) is not None:
            self._files.unlink(path)
        self._files.put(path, SocketName(listener))
        self._listeners.append(listener)
        return listener

    def unread(self, stream: Any) -> tuple[int, int]:
        self._check()
        return 0, 0

    def has_vsock(self) -> bool:
        return False

    # Files

    async def mkdir(self, path: Path, mode: int = 0o700) -> None:
        def make() -> None:
            if self._files.find(path) is None:
                self._write_may_fail(path)
            self._files.mkdir(path)

        await self._call(make)

    async def remove_tree(self, path: Path) -> None:
        self.check_removable(path)
        await self._call(lambda: self._files.remove_tree(path))

    async def remove_file(self, path: Path) -> None:
        self.check_removable(path)

        def remove() -> None:
            if self._files.find(path) is not None:
                self._files.unlink(path)

        await self._call(remove)

    async def read_bytes(self, path: Path, limit: int = 2**24) -> bytes:
        return await self._call(lambda: bytes(self._files.file(path).data[:limit]))

    async def read_tail(self, path: Path, limit: int) -> bytes:
        return await self._call(lambda: bytes(self._files.file(path).data[-limit:]))

    async def write_bytes(self, path: Path, data: bytes, mode: int = 0o600) -> None:
        def write() -> None:
            self._write_may_fail(path)
            self._files.put(path, File(bytearray(data), len(data), data))
            self._files.sync_directory(path.parent)

        await self._call(write)

    async def move_directory(self, path: Path, to: Path) -> None:
        def move() -> None:
            if fault("directory.does_not_move"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            if self._files.find(to) is not None and self._files.below(to):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(to))
            self._files.rename(path, to)
            for qemu in self._machine.qemus.values():
                if qemu.directory == path:
                    qemu.directory = to

        await self._call(move)

    async def copy_file(self, source: Path, target: Path, mode: int = 0o600) -> None:
        await self._call(lambda: self._copy(source, target))

    def _copy(self, source: Path, target: Path) -> None:
        self._write_may_fail(target)
        node = self._files.file(source)
        self._files.put(target, File(bytearray(node.data), node.size))

    async def copy_sparse(self, source: Path, target: Path, mode: int = 0o600) -> None:
        await self._call(lambda: self._copy(source, target))

    async def copy_mapped_file(self, identity: ProcessIdentity, size: int, target: Path, mode: int = 0o600) -> None:
        def copy() -> None:
            self._write_may_fail(target)
            self._mapped(identity)
            self._files.put(target, File(size=size))

        await self._call(copy)

    async def copy_own_pages(self, identity: ProcessIdentity, size: int, target: Path) -> int:
        def copy() -> int:
            self._write_may_fail(target)
            self._mapped(identity)
            self._files.file(target)
            return size // 8

        return await self._call(copy)

    def _mapped(self, identity: ProcessIdentity) -> None:
        with self.open_process(identity) as process:
            if process.exited or not self._machine.qemus[identity.pid].waits_for_state:
                raise ProcessGone(f"process {identity.pid} has no private mapping")

    async def put_in_place(self, fresh: Path, path: Path) -> None:
        def put() -> None:
            node = self._files.get(fresh)
            if isinstance(node, File):
                node.synced = bytes(node.data)
            self._files.rename(fresh, path)
            self._files.sync_directory(path.parent)

        await self._call(put)

    async def keep_tail(self, path: Path, limit: int) -> bool:
        def cut() -> bool:
            node = self._files.find(path)
            if not isinstance(node, File) or len(node.data) <= limit:
                return False
            node.data.clear()
            node.size = 0
            return True

        return await self._call(cut)

    async def make_fifo(self, path: Path, mode: int = 0o600) -> None:
        def make() -> None:
            if not isinstance(self._files.find(path), Fifo):
                self._files.put(path, Fifo())

        await self._call(make)

    async def allocate_file(self, path: Path, size: int, mode: int = 0o600, *, reserve: bool = True) -> None:
        def allocate() -> None:
            self._write_may_fail(path)
            # Only how long it is matters: nobody looks into a simulated guest's memory.
            self._files.put(path, File(size=size))

        await self._call(allocate)

    def unbacked_space(self, path: Path) -> int:
        self._check()
        return 0

    def free_space(self, path: Path) -> int:
        self._check()
        return 0 if self._machine.disk_full else 2**40

    def fingerprint(self, path: Path) -> str:
        self._check()
        node = self._files.file(path)
        return f"{node.size}.{zlib.crc32(node.data)}"

    def disk_usage(self, path: Path) -> int:
        self._check()
        if path.name.endswith((".db", ".db-wal")):
            with allow_real("files"):
                return path.stat().st_size if path.exists() else 0
        return sum(self._files.file(inner).size for inner in [path, *self._files.below(path)] if self._is_file(inner))

    def _is_file(self, path: Path) -> bool:
        return isinstance(self._files.find(path), File)

    def exists(self, path: Path) -> bool:
        self._check()
        if path.name.endswith((".db", ".db-wal")):
            with allow_real("files"):
                return path.exists()
        return self._files.find(path) is not None

    def file_size(self, path: Path) -> int:
        self._check()
        return self._files.file(path).size

    def list_directory(self, path: Path) -> list[str]:
        self._check()
        return self._files.names(path)

    def open_file(self, path: Path, flags: int, mode: int = 0o600) -> int:
        self._check()
        if path.suffix == ".db" and flags & os.O_CREAT:
            with allow_real("files"):
                path.touch(mode)
        return self._files.open(path, flags)

    def open_pipe(self, path: Path) -> Any:
        self._check()
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), str(path))

    def reserve_space(self, path: Path, size: int) -> None:
        self._check()
        self._write_may_fail(path)
        self._files.put(path, File(size=size))

    def close_file(self, fd: int) -> None:
        self._check()
        self._files.close(fd)

    def read_at(self, fd: int, limit: int, offset: int) -> bytes:
        self._check()
        return self._files.read_at(fd, limit, offset)

    def write(self, fd: int, data: bytes) -> int:
        self._check()
        if self._machine.disk_full or fault("disk.full"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if len(data) > 1 and fault("disk.writes_half"):
            data = data[: self._machine.rng.randrange(1, len(data))]
        return self._files.write(fd, data)

    def write_at(self, fd: int, data: bytes, offset: int) -> int:
        self._check()
        self._files.seek(fd, offset)
        return self.write(fd, data)

    def sync_file(self, fd: int) -> None:
        self._check()
        self._files.sync_file(fd)

    def sync_directory(self, path: Path) -> None:
        self._check()
        self._files.sync_directory(path)

    def rename(self, path: Path, to: Path) -> None:
        self._check()
        self._machine.databases.rename(path, to)

    def unlink(self, path: Path) -> None:
        self._check()
        self.check_removable(path)
        self._machine.databases.unlink(path)

    def punch_hole(self, fd: int, start: int, length: int) -> bool:
        self._check()
        self._files.punch(fd, start, length)
        return True

    @contextmanager
    def watch(self, path: Path) -> Iterator[Any]:
        self._check()
        node = self._files.get(path)
        assert isinstance(node, File | Directory)
        watch = Watch()
        node.watchers.append(watch)
        try:
            yield watch
        finally:
            node.watchers.remove(watch)

    async def run_blocking(self, call: Callable[..., T], *args: object) -> T:
        def run() -> T:
            writes = getattr(call, "__qualname__", "") == "Database.write"
            if writes and (self._machine.disk_full or fault("database.fails")):
                raise apsw.FullError("database or disk is full")
            with allow_real("files"):
                return call(*args)

        return await self._call(run)

    # The machine

    def memory_total_mb(self) -> int:
        return self._machine.memory_mb

    def memory_available_mb(self) -> int:
        self._check()
        used = sum((qemu.ram_in_use() or File()).size for qemu in self._machine.running()) // 2**20
        return 0 if fault("memory.is_short") else self._machine.memory_mb - used

    def figures(self) -> HostFigures:
        return HostFigures(0.0, self._machine.memory_mb, self.memory_available_mb())
