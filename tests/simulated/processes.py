"""The processes of the simulated machine, as one daemon sees them."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from actors import fault
from volant.host import Ownership, Proc, Process, Processes, ProcessGone, ProcessStatus, ProcessUsage
from volant.model import ProcessIdentity

from .calls import Calls
from .file_system import File
from .process import SimProcess

_QCOW2 = b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(72)
"""The header of an image without a base."""
_STUBBORN_S = 45.0


class SimProcesses(Processes):
    def __init__(self, calls: Calls, own: Ownership) -> None:
        self._calls = calls
        self._machine = calls.machine
        self._own = own
        self._children: dict[int, ProcessIdentity] = {}

    def boot_id(self) -> str:
        return self._machine.boot_id

    async def spawn(
        self, argv: Sequence[str], *, tag: str, cwd: Path, stdout_path: Path, **_: object
    ) -> ProcessIdentity:
        def start() -> ProcessIdentity:
            if fault("process.does_not_start"):
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), argv[0])
            assert any(tag in argument for argument in argv), (tag, argv)
            if self._machine.files.find(stdout_path) is None:
                self._machine.files.put(stdout_path, File())
            identity = self._machine.spawn(list(argv), tag, cwd, stdout_path)
            if fault("process.is_stubborn"):
                self._machine.processes[identity.pid].stubborn_s = _STUBBORN_S
            self._children[identity.pid] = identity
            return identity

        return await self._calls.run(start)

    async def run(self, argv: Sequence[str], **_: object) -> tuple[int, bytes]:
        def run() -> tuple[int, bytes]:
            match argv[0]:
                case "qemu-system-x86_64" if "--version" in argv:
                    return 0, b"QEMU emulator version 10.0.13 (Debian)\n"
                case "qemu-system-x86_64" if "help" in argv:
                    return 0, b"Supported machines are:\nmicrovm  microvm\npc-q35-9.2  A PC\npc-q35-10.0  A PC\n"
                case "passt":
                    self._machine.spawn_passt(list(argv))
                case "cp":
                    self._calls.check_space(Path(argv[-1]))
                    self._machine.files.copy(Path(argv[-2]), Path(argv[-1]))
                case "mke2fs":
                    node = self._made(argv)
                    assert not node.data, f"{argv[-1]} has content, and is formatted"
                    if fault("mke2fs.fails"):
                        return 1, b"mke2fs: Input/output error while writing out and closing file system"
                    node.data[:] = b"ext4"
                case "qemu-img":
                    self._made(argv).data[:] = _QCOW2
                case program:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
            return 0, b""

        return await self._calls.run(run)

    def _made(self, argv: Sequence[str]) -> File:
        """Returns the file that a program makes or fills: the last one on its command line, before a size."""
        path = Path(next(argument for argument in reversed(argv) if argument.startswith("/")))
        if self._machine.files.find(path) is None:
            self._machine.files.put(path, File())
        return self._machine.files.file(path)

    async def scan(self, tag_prefix: str, *, of_anybody: bool = False) -> list[ProcessIdentity]:
        if not self._own.owns(tag_prefix):
            return []
        return await self._calls.run(
            lambda: [
                process.identity for process in self._machine.living() if process.identity.tag.startswith(tag_prefix)
            ]
        )

    def open(self, identity: ProcessIdentity) -> Process:
        self._calls.check()
        self._own.check_process(identity)
        process = self._machine.processes.get(identity.pid)
        child = self._children.get(identity.pid) == identity
        if identity.boot_id != self._machine.boot_id or process is None or process.identity != identity:
            raise ProcessGone(f"there is no process {identity.pid}")
        if not process.alive and not child:
            raise ProcessGone(f"process {identity.pid} has ended")
        return SimHandle(process, self._signal, child=child)

    def _signal(self, process: SimProcess, signum: int) -> None:
        self._calls.check()
        if process.alive:
            self._machine.signal(process, signum)


class SimHandle(Process):
    """A handle on a process; `child` where the daemon started it itself and can read its exit status."""

    def __init__(self, process: SimProcess, kill: Callable[[SimProcess, int], None], *, child: bool) -> None:
        self._process = process
        self._kill = kill
        self._child = child

    @property
    def identity(self) -> ProcessIdentity:
        return self._process.identity

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def exited(self) -> bool:
        return not self._process.alive

    async def wait(self) -> int | None:
        await trio.lowlevel.checkpoint()
        await self._process.ended.wait()
        return self._process.status if self._child else None

    def kill(self, signum: int = signal.SIGKILL) -> None:
        self._kill(self._process, signum)

    def close(self) -> None:
        pass

    def __enter__(self) -> SimHandle:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class SimProc(Proc):
    def __init__(self, calls: Calls, processes: Processes, own: Ownership) -> None:
        self._machine = calls.machine
        self._processes = processes
        self._own = own

    def command_line(self, identity: ProcessIdentity) -> list[str]:
        self._check_alive(identity)
        return list(self._machine.processes[identity.pid].argv)

    def working_directory(self, identity: ProcessIdentity) -> Path:
        self._check_alive(identity)
        return self._machine.qemus[identity.pid].directory

    def status(self, identity: ProcessIdentity) -> ProcessStatus:
        self._check_alive(identity)
        return ProcessStatus(user=os.geteuid(), capabilities=0, no_new_privileges=False, filters=0)

    def wakeups(self, identity: ProcessIdentity) -> int:
        self._check_alive(identity)
        return 0

    def usage(self, identity: ProcessIdentity) -> ProcessUsage:
        self._check_alive(identity)
        return ProcessUsage(0.0, 0, 0, 0)

    def is_ours(self, identity: ProcessIdentity) -> bool:
        return self._own.owns(identity.tag)

    def has_open(self, identity: ProcessIdentity, path: Path) -> bool:
        self._check_alive(identity)
        return False

    async def users(self) -> frozenset[int]:
        return frozenset([os.geteuid()])

    def _check_alive(self, identity: ProcessIdentity) -> None:
        with self._processes.open(identity) as process:
            if process.exited:
                raise ProcessGone(f"process {identity.pid} has ended")
