"""The one seam to the operating system.

Everything that the VM actor, the hypervisor driver, the channel and the journal want from the machine goes through a
`Host` that is handed to them: processes, Unix sockets, files, the wall clock, ids. A simulated host is a subclass, or
any object with the same methods; nothing in this module is reached by a global.

**Processes are known by an identity, not by a pid.** A daemon that comes back finds a number in its row, and by then
the number may belong to somebody else. So an identity is pid, start time, boot id and a tag that stands on the command
line; a handle opens a pidfd first and compares afterwards, so what it compared is what it signals and waits for.

**Nothing here waits by polling.** A pidfd becomes readable when its process ends, also when the process is not our
child; inotify tells of a file that grew. All watches share one inotify instance, as a user may have only 128 of them.
There is no background task that reads it (a `Host` has no nursery): whichever waiter came first reads for all, and
hands that on when it leaves.

**Children are reaped here.** Whoever waits first takes the exit status, and every other handle of the same child sees
it too. A child that nobody watches is collected by the next `spawn()`, `find()` or `processes()`, and its status kept
for whoever opens it later. `subprocess.Popen` is used for its careful fork and exec alone, and forgotten at once: two
parties that wait for one child steal its status.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import inotify_simple
import msgspec
import trio

from volant import _cgroups, _memory, _priority, _sandbox
from volant._cgroups import Bounds, Cgroups
from volant._directories import make_own_directory
from volant._own import check_removable
from volant._sandbox import Grant, Sandbox
from volant._scopes import ScopeError, Scopes
from volant._tap import open_tap
from volant.model import ProcessIdentity

__all__ = [
    "Bounds",
    "FileWatch",
    "Grant",
    "Host",
    "HostFigures",
    "Process",
    "ProcessGone",
    "ProcessMemory",
    "ProcessStatus",
    "Sandbox",
    "SandboxSupport",
]

T = TypeVar("T")
_logger = logging.getLogger("volant.host")

_PROC = Path("/proc")
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_TAG = re.compile(r"[A-Za-z0-9._:@-]{4,100}")
_TOKENS = re.compile(rb"[\0,=]")
_FICLONE = 0x40049409

_READ_LIMIT = 16 * 1024 * 1024
_STATUSES_KEPT = 256
_FULL_S = 0.005
"""Between two tries to connect to a socket at which too many wait."""
_LOWER_AGAIN_S, _LOWER_TRIES = 0.25, 40
"""The kernel takes ten a second of all processes without CAP_SYS_ADMIN."""
_LOOKS_AT_ONCE = 2
"""How many processes' mappings the kernel walks through for us at a time; each takes milliseconds of a processor."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class ProcessGone(Exception):
    """There is no process with this identity (any more)."""


class HostFigures(msgspec.Struct, frozen=True):
    """What the machine as a whole is doing."""

    cpu_percent: float  #: busy share of all CPUs, 0 to 100, since the previous call (since boot at the first one)
    memory_total_mb: int
    memory_available_mb: int


class ProcessMemory(msgspec.Struct, frozen=True):
    """What a process takes of the machine's memory."""

    rss_kb: int  #: all that it has mapped and that is there
    pss_kb: int  #: likewise, what it shares counted by its part: the sum over all processes is what they take together
    private_kb: int  #: mapped by nobody else, and free once it ends, unless it is of a file
    shared_kb: int  #: mapped by others too


class SandboxSupport(msgspec.Struct, frozen=True):
    """Holds which layers of the sandbox this host supports, and why not the others."""

    landlock: int  #: its version; 0: there is none
    no_connect: bool  #: whether a process can be kept from connecting
    no_users: str | None  #: why no process can be given a user of its own; None: it can


class ProcessStatus(msgspec.Struct, frozen=True):
    """What the kernel says of a process's rights."""

    user: int
    capabilities: int  #: those that it has, or may get, a bit each
    no_new_privileges: bool
    filters: int  #: of system calls


class _Child:
    """A process that this host started, and its exit status once somebody has collected it."""

    __slots__ = ("pidfd", "reaped", "seen", "start_time", "status")

    def __init__(self, pidfd: int, start_time: int) -> None:
        self.pidfd = pidfd
        self.start_time = start_time
        self.reaped = False
        self.seen = False
        self.status: int | None = None

    def collect(self) -> None:
        """Take the exit status if the process has ended; never blocks."""
        if self.reaped:
            return
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            # SIGCHLD is ignored in this process, or somebody else reaped: the status is lost, the end is not.
            if not _readable(self.pidfd):
                return
        else:
            if result is None:
                return
            self.status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        self.reaped = True


class Process:
    """A handle on one process, started by us or adopted. Close it; that does nothing to the process.

    Use it as a context manager. There is no public constructor: `Host.open_process` makes one.
    """

    __slots__ = ("_child", "_pidfd", "identity")

    def __init__(self, identity: ProcessIdentity, pidfd: int, child: _Child | None) -> None:
        self.identity = identity
        self._pidfd = pidfd
        self._child = child

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def exited(self) -> bool:
        """Whether the process has ended, as of now."""
        return _readable(self._pidfd)

    async def wait(self) -> int | None:
        """Wait for the end. Several tasks may wait at once.

        Gives the exit status: 0 to 255, or minus the signal number; None where it cannot be known, as the process was
        adopted and is no child of ours.
        """
        # A descriptor of its own for each waiter: Trio lets only one task wait on a descriptor.
        own = os.dup(self._pidfd)
        try:
            await trio.lowlevel.wait_readable(own)
        finally:
            # What it stands for is open elsewhere, so epoll would keep it, and tell the end of this process to whoever
            # waits for another one on a descriptor of the same number.
            trio.lowlevel.notify_closing(own)
            os.close(own)
        if self._child is None:
            return None
        self._child.collect()
        self._child.seen = True
        return self._child.status

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal. A process that has ended already is no error.

        Raises PermissionError when the process is somebody else's.
        """
        try:
            signal.pidfd_send_signal(self._pidfd, signum)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class FileWatch:
    """Tells that a file was written to, or that a directory got a new name. One task waits on it. `Host.watch` makes
    one."""

    __slots__ = ("_changed", "_poke", "_watches", "_wd")

    def __init__(self, watches: _Watches, wd: int) -> None:
        self._watches = watches
        self._wd = wd
        self._changed = False
        self._poke: trio.Event | None = None

    async def wait(self) -> None:
        """Return once the file was modified after the last `wait()` returned (or after the watch began).

        Read to the end of the file, then wait, and again: nothing that is written in between is missed.
        """
        await self._watches.wait(self)


class _Watches:
    """One inotify instance for all watches of a host; see the module's essay."""

    def __init__(self) -> None:
        self._inotify: Any = None
        self._by_wd: dict[int, list[FileWatch]] = {}
        self._waiting: dict[FileWatch, None] = {}
        self._reader: FileWatch | None = None

    @contextmanager
    def open(self, path: Path) -> Iterator[FileWatch]:
        if self._inotify is None:
            self._inotify = inotify_simple.INotify(nonblocking=True)
        try:
            wd = self._inotify.add_watch(path, inotify_simple.flags.MODIFY | inotify_simple.flags.CREATE)
        except BaseException:
            self._close_when_idle()
            raise
        watch = FileWatch(self, wd)
        self._by_wd.setdefault(wd, []).append(watch)
        try:
            yield watch
        finally:
            watches = self._by_wd[wd]
            watches.remove(watch)
            if not watches:
                del self._by_wd[wd]
                try:
                    self._inotify.rm_watch(wd)
                except OSError:
                    pass  # the file is gone, and its watch with it
            self._close_when_idle()

    def _close_when_idle(self) -> None:
        if not self._by_wd:
            self._inotify.close()
            self._inotify = None

    async def wait(self, watch: FileWatch) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not watch._changed:
            poke = watch._poke = trio.Event()
            self._waiting[watch] = None
            try:
                if self._reader is None:
                    self._reader = watch
                    await trio.lowlevel.wait_readable(self._inotify.fileno())
                    self._dispatch()
                else:
                    await poke.wait()
            finally:
                del self._waiting[watch]
                if self._reader is watch:
                    self._reader = None
                if self._reader is None:
                    # Also when this one never read: it may have been woken to do so, and leaves instead.
                    self._wake_next_reader()
        watch._changed = False
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _dispatch(self) -> None:
        for event in self._inotify.read(timeout=0):
            if event.mask & inotify_simple.flags.Q_OVERFLOW:
                touched = [watch for watches in self._by_wd.values() for watch in watches]
            else:
                touched = self._by_wd.get(event.wd, [])
            for watch in touched:
                watch._changed = True
                if watch._poke is not None:
                    watch._poke.set()

    def _wake_next_reader(self) -> None:
        for watch in self._waiting:
            if watch._poke is not None and not watch._poke.is_set():
                watch._poke.set()
                return


class Host:
    """The real machine. One for a daemon; a test hands in a subclass or a stand-in."""

    def __init__(
        self,
        scopes: Scopes | None = None,
        groups: Cgroups | None = None,
        users: range | None = None,
        *,
        lowers: bool = False,
    ) -> None:
        """`scopes`: where a process gets a scope of its own; None: there is no such place. `groups`: where it gets a
        control group of its own then; None: nor that. `users`: those that hypervisors have, and nobody else; None:
        they run as we do. `lowers`: whether a process that gets a scope gets less of the processors than we do."""
        self._scopes = scopes
        self._groups = groups
        self._lowers = lowers
        # Only root can have given them.
        self._users = users if users is not None and os.geteuid() == 0 else range(0)
        self._children: dict[int, _Child] = {}
        self._watches = _Watches()
        self._boot_id: str | None = None
        self._cpu_before = (0, 0)
        self._looks = trio.CapacityLimiter(_LOOKS_AT_ONCE)
        self._own_directories: tuple[Path, ...] | None = None
        self._own_tags = ""

    def confine(self, directories: Sequence[Path], tag_prefix: str) -> None:
        """Remove nothing from now on that does not lie below one of these directories, and find, open and signal no
        process whose tag does not begin with `tag_prefix`: whatever a row, a file or a process says."""
        self._own_directories, self._own_tags = tuple(directories), tag_prefix

    def check_removable(self, path: Path) -> None:
        """:raises OSError: it is not ours to remove."""
        if self._own_directories is not None:
            check_removable(path, self._own_directories)

    def check_own(self, identity: ProcessIdentity) -> None:
        """:raises ProcessGone: it is not ours, so that for us there is none."""
        if not identity.tag.startswith(self._own_tags):
            raise ProcessGone(f"process {identity.pid} is none of this daemon's: its tag is {identity.tag[:100]!r}")

    # Time and names

    def wall_clock(self) -> datetime:
        """The time of day, in UTC. It may jump; deadlines use Trio's clock."""
        return datetime.now(UTC)

    def new_id(self) -> str:
        """32 hexadecimal digits that were never given out before."""
        return uuid.uuid4().hex

    def entropy(self, size: int) -> bytes:
        """Random bytes, good enough for keys."""
        return os.urandom(size)

    def boot_id(self) -> str:
        """The kernel's id of this boot: pids and start times mean nothing beyond it."""
        if self._boot_id is None:
            self._boot_id = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return self._boot_id

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
        """Start a process that outlives us: own session, stdin null, no core dump, and of our descriptors only
        `descriptors`, under the same numbers. `sandbox`: what it may do; None: what we may do.

        `tag` must stand on the command line already, as a whole argument or between `,` and `=` of one; letters,
        digits and `._:@-`, 4 to 100 of them. Stdout and stderr are appended to `stdout_path` (made 0600), a path
        that the caller keeps within bounds with `keep_tail`. Not cancelled half-way.

        Raises OSError when the program cannot be started, or the sandbox can't be set up, ValueError for a bad
        tag.
        """
        if not _TAG.fullmatch(tag) or tag not in _tokens("\0".join(argv).encode()):
            raise ValueError(f"the tag {tag!r} is malformed or not on the command line")
        self._collect_children()
        pid = await trio.to_thread.run_sync(self._spawn, list(argv), dict(env), cwd, stdout_path, sandbox, descriptors)
        # Not reaped by anybody yet, so the pid is still its own.
        pidfd = os.pidfd_open(pid)
        start_time = _stat(pid)[0]
        self._children[pid] = _Child(pidfd, start_time)
        try:
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        except (ProcessLookupError, PermissionError):
            pass  # it has ended, or changed its user: then it has set its own limits
        return ProcessIdentity(pid=pid, start_time=start_time, boot_id=self.boot_id(), tag=tag)

    def _spawn(
        self,
        argv: list[str],
        env: dict[str, str],
        cwd: Path,
        stdout_path: Path,
        sandbox: Sandbox | None,
        descriptors: Sequence[int],
    ) -> int:
        output = os.open(stdout_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            if sandbox is not None:
                popen = _sandbox.start(argv, env, cwd, output, sandbox, descriptors)
            else:
                popen = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=env,
                    cwd=cwd,
                    close_fds=True,
                    pass_fds=descriptors,
                    start_new_session=True,
                )
        finally:
            os.close(output)
        # Popen must neither reap this child nor warn of it when it is collected as garbage.
        popen.returncode = 0
        return popen.pid

    def _collect_children(self) -> None:
        ended = []
        for pid, child in self._children.items():
            child.collect()
            if child.reaped:
                ended.append((pid, child))
        unseen = [child for _, child in ended if not child.seen]
        too_many = set(unseen[:-_STATUSES_KEPT])
        for pid, child in ended:
            if child.seen or child in too_many:
                del self._children[pid]
                os.close(child.pidfd)

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
        """Run a short program to its end: exit status (minus the signal number), and stdout and stderr together.

        It is killed past `timeout_s`, past `output_limit` bytes of output, and as soon as it has said `until`. Raises
        OSError when it cannot be started, trio.TooSlowError.
        """
        with _file_of(stdin) as given:
            process = await trio.lowlevel.open_process(
                list(argv),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        assert process.stdout is not None
        output = bytearray()
        try:
            async with process.stdout:
                with trio.fail_after(timeout_s):
                    while data := await process.stdout.receive_some(output_limit):
                        output += data
                        if len(output) > output_limit or (until is not None and until in output):
                            process.kill()
                            break
                    return await process.wait(), bytes(output[:output_limit])
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True), trio.move_on_after(5.0):
                    await process.wait()

    async def find(self, tag: str) -> ProcessIdentity | None:
        """The living process that carries exactly this tag, or None. The oldest, should there be several."""
        found = [identity for identity in await self.processes(tag) if identity.tag == tag]
        return min(found, key=lambda identity: identity.start_time, default=None)

    async def processes(self, tag_prefix: str, *, of_anybody: bool = False) -> list[ProcessIdentity]:
        """Every living process that carries a tag with this prefix. Reads all of /proc: once, not in a loop.

        Any user can start a process that carries a tag, so only those of our own user and of hypervisors' users
        count, unless `of_anybody` says otherwise. Only leaders of a session count, as `spawn` makes them: somebody's
        `pgrep` for the tag is not taken for it. None where such tags are not ours.
        """
        if not tag_prefix.startswith(self._own_tags):
            return []
        self._collect_children()
        return await trio.to_thread.run_sync(self._processes, tag_prefix, of_anybody)

    def _processes(self, tag_prefix: str, of_anybody: bool) -> list[ProcessIdentity]:
        found = []
        for entry in os.scandir(_PROC):
            if not entry.name.isdigit():
                continue
            pid = int(entry.name)
            try:
                tags = [t for t in _tokens(_cmdline(pid)) if t.startswith(tag_prefix) and _TAG.fullmatch(t)]
                if not tags:
                    continue
                start_time, session, state = _stat(pid)
                if not of_anybody and not self._is_of_ours(pid):
                    continue
            except (OSError, ValueError):
                continue
            if session == pid and state not in "ZX":
                found.append(ProcessIdentity(pid=pid, start_time=start_time, boot_id=self.boot_id(), tag=tags[0]))
        return found

    def is_of_ours(self, identity: ProcessIdentity) -> bool:
        """Whether a process runs as we do, or as a hypervisor. :raises ProcessGone: there is none of this identity."""
        with self.open_process(identity) as process:
            try:
                return self._is_of_ours(process.pid)
            except OSError as error:
                raise ProcessGone(f"process {identity.pid} has ended") from error

    def _is_of_ours(self, pid: int) -> bool:
        user = _real_user(pid)
        return user in (os.getuid(), os.geteuid()) or user in self._users

    def has_open(self, identity: ProcessIdentity, path: Path) -> bool:
        """Whether a process has a file open, which is there. What its descriptors are called does not count, as it can
        have names of its own for files. :raises ProcessGone: there is none with this identity, or it is not ours to
        look at."""
        try:
            wanted = path.stat()
        except OSError:
            return False
        with self.open_process(identity) as process:
            try:
                for descriptor in (_PROC / str(process.pid) / "fd").iterdir():
                    with suppress(FileNotFoundError):
                        found = descriptor.stat()
                        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                            return True
            except OSError as error:
                raise ProcessGone(f"process {identity.pid} can't be looked at") from error
        return False

    async def end_all(self, tag: str, known: ProcessIdentity | None = None) -> None:
        """Kill every process that carries exactly this tag, and `known`, whatever is on its command line by now; none
        is left when this returns. The deadline is the caller's. Reads all of /proc. Raises OSError."""
        found = {identity for identity in await self.processes(tag) if identity.tag == tag}
        if known is not None:
            found.add(known)
        await self.end(found)

    async def end(self, identities: Iterable[ProcessIdentity]) -> None:
        """Kill processes; all have ended when this returns. The deadline is the caller's. Raises OSError."""
        with ExitStack() as stack:
            handles = []
            for identity in identities:
                with suppress(ProcessGone):
                    handles.append(stack.enter_context(self.open_process(identity)))
            # All of them first: none waits for one that is slow to end.
            for process in handles:
                process.kill()
            for process in handles:
                await process.wait()

    def command_line(self, identity: ProcessIdentity) -> list[str]:
        """The arguments that a process was started with. :raises ProcessGone: there is none with this identity."""
        with self.open_process(identity) as process:
            try:
                words = _cmdline(process.pid).rstrip(b"\0").split(b"\0")
            except OSError as error:
                raise ProcessGone(f"process {identity.pid} has ended") from error
            if process.exited:
                raise ProcessGone(f"process {identity.pid} has ended")
            return [os.fsdecode(word) for word in words]

    async def process_memory(self, identity: ProcessIdentity, timeout_s: float) -> ProcessMemory:
        """What a process takes of the memory. It costs some milliseconds a GiB, so it is for who asks.

        Raises ProcessGone, OSError where the process may not be looked into, trio.TooSlowError.
        """
        with self.open_process(identity) as process, trio.fail_after(timeout_s):
            try:
                # Who holds the mappings' lock holds this up too, for ever if he hangs.
                text = await trio.to_thread.run_sync(
                    (_PROC / str(process.pid) / "smaps_rollup").read_text, abandon_on_cancel=True, limiter=self._looks
                )
            except (FileNotFoundError, ProcessLookupError) as error:
                raise ProcessGone(f"process {identity.pid} has ended") from error
            if process.exited or not text:
                raise ProcessGone(f"process {identity.pid} has ended")
            return _process_memory(text)

    def process_status(self, identity: ProcessIdentity) -> ProcessStatus:
        """What a process may. :raises ProcessGone: there is none with this identity."""
        with self.open_process(identity) as process:
            try:
                lines = (_PROC / str(process.pid) / "status").read_text().splitlines()
            except OSError as error:
                raise ProcessGone(f"process {identity.pid} has ended") from error
            if process.exited:
                raise ProcessGone(f"process {identity.pid} has ended")
        said = {name: text.split() for name, _, text in (line.partition(":") for line in lines)}
        held, more, bound = (int(said[name][0], 16) for name in ("CapPrm", "CapInh", "CapBnd"))
        none_new = said["NoNewPrivs"][0] == "1"
        return ProcessStatus(
            user=int(said["Uid"][1]),
            capabilities=held if none_new else held | more | bound,
            no_new_privileges=none_new,
            filters=int(said.get("Seccomp_filters", said["Seccomp"])[0]),
        )

    async def users_of_processes(self) -> frozenset[int]:
        """Whose processes run. Reads all of /proc: once, not in a loop."""

        def look() -> frozenset[int]:
            found = set()
            for entry in os.scandir(_PROC):
                if entry.name.isdigit():
                    try:
                        found.add(entry.stat().st_uid)
                    except OSError:
                        continue
            return frozenset(found)

        return await trio.to_thread.run_sync(look)

    # Sandbox

    def sandbox_support(self, directories: Sequence[Path]) -> SandboxSupport | None:
        """Returns which layers a sandbox can have, for processes that use files in these existing directories; None
        where a host needs no sandbox. Raises OSError."""
        return SandboxSupport(_sandbox.landlock_version(), _sandbox.has_filter(), _why_no_users(directories))

    def group_for(self, device: Path) -> int | None:
        """The group whose members may open a device; None: everybody may. Raises OSError; PermissionError when only its
        owner may."""
        figures = device.stat()
        if figures.st_mode & 0o006 == 0o006:
            return None
        if figures.st_mode & 0o060 == 0o060 and figures.st_gid:
            return figures.st_gid
        raise PermissionError(errno.EACCES, f"no other user than {figures.st_uid} may open it", str(device))

    async def grant(self, grants: Sequence[Grant], below: Sequence[Path]) -> None:
        """Let somebody use files, and nobody else but their owner. Directories above them that are one of `below`, or
        in one, let everybody through from then on, and show nobody what is in them. Raises OSError."""
        await trio.to_thread.run_sync(_sandbox.grant, grants, below)

    async def lend_directory(self, path: Path, user: int, grants: Sequence[Grant], below: Sequence[Path]) -> None:
        """Let a user make files in a directory of ours that we can use, too, and remove or replace none of ours; and
        `grant` besides. Raises OSError."""

        def lend() -> None:
            _sandbox.lend_directory(path, user)
            _sandbox.grant(grants, below)

        await trio.to_thread.run_sync(lend)

    def working_directory(self, identity: ProcessIdentity) -> Path:
        """Where a process works, under the name that the directory has by now.

        :raises ProcessGone: there is none with this identity, or it is not ours to look at.
        """
        with self.open_process(identity) as process:
            try:
                path = (_PROC / str(process.pid) / "cwd").readlink()
            except OSError as error:
                raise ProcessGone(f"process {identity.pid} can't be looked at") from error
            if process.exited:
                raise ProcessGone(f"process {identity.pid} has ended")
            return path

    def open_process(self, identity: ProcessIdentity) -> Process:
        """A handle on the process with this identity, ours or adopted. A child of ours that has ended can be opened
        until somebody has seen its status.

        Raises ProcessGone when there is none: another boot, another start time, not ours, another command line, unless
        it runs as a hypervisor.
        """
        self.check_own(identity)
        if identity.boot_id != self.boot_id():
            raise ProcessGone(f"process {identity.pid} belongs to another boot of this machine")
        child = self._children.get(identity.pid)
        if child is not None and child.start_time == identity.start_time:
            return Process(identity, os.dup(child.pidfd), child)
        try:
            pidfd = os.pidfd_open(identity.pid)
        except OSError as error:
            raise ProcessGone(f"there is no process {identity.pid}") from error
        try:
            start_time, _, state = _stat(identity.pid)
            if start_time != identity.start_time:
                raise ProcessGone(f"process {identity.pid} is another one by now")
            if state in "ZX":
                raise ProcessGone(f"process {identity.pid} has ended")
            # A hypervisor that somebody has taken over can write another command line. Its user has no other processes.
            if identity.tag not in _tokens(_cmdline(identity.pid)) and _real_user(identity.pid) not in self._users:
                raise ProcessGone(f"process {identity.pid} does not carry the tag {identity.tag}")
        except (OSError, ValueError) as error:
            os.close(pidfd)
            raise ProcessGone(f"process {identity.pid} has ended") from error
        except ProcessGone:
            os.close(pidfd)
            raise
        return Process(identity, pidfd, None)

    async def give_own_scope(self, identity: ProcessIdentity, description: str, bounds: Bounds | None = None) -> None:
        """Take a process out of the daemon's control group, so that what systemd does to the daemon does not touch it,
        and bound what it takes of the machine, as far as the host can; `bounds` None: it is not bounded. Its tag
        becomes the name of its scope, or of its group where there is no systemd. Where there is neither, or it can't
        be, the process stays where it is, and the log says so.
        """
        try:
            if self._scopes is not None:
                await self._scopes.enclose(identity.pid, identity.tag, description, bounds)
            elif self._groups is not None:
                await trio.to_thread.run_sync(self._groups.enclose, identity.pid, identity.tag, bounds)
        except (ScopeError, OSError) as error:
            _logger.warning("process %d stays in the daemon's control group: %s", identity.pid, error)
        if self._lowers:
            await self._lower(identity)

    async def _lower(self, identity: ProcessIdentity) -> None:
        for _ in range(_LOWER_TRIES):
            try:
                with self.open_process(identity) as process:
                    _priority.lower(process.pid)
                return
            except BlockingIOError:
                await trio.sleep(_LOWER_AGAIN_S)
            except (ProcessGone, OSError):
                # Without it guests that are busy slow the daemon down; nothing else comes of that.
                return

    async def remove_empty_scopes(self, ended: str | None = None) -> None:
        """Remove the control groups of processes that have ended, where they are ours to remove. `ended`: the tag of
        a process that ends at present; its group is waited for, up to a second."""
        if self._groups is not None:
            await trio.to_thread.run_sync(self._groups.remove_empty, ended)

    def limits_of(self, identity: ProcessIdentity) -> dict[str, str] | None:
        """What the kernel holds a process to, by the names of the files in its control group; None: it has none of its
        own."""
        group = self._own_group(identity)
        return None if group is None else _cgroups.limits_in(group)

    def memory_events(self, identity: ProcessIdentity) -> Path | None:
        """The file that changes when the kernel kills a process as memory is short; None: nobody tells of it."""
        group = self._own_group(identity)
        return None if group is None else _cgroups.events_of(group)

    def killed_for_memory(self, events: Path) -> int:
        """How many processes have been. Raises OSError."""
        return _cgroups.killed_in(events.read_text())

    def _own_group(self, identity: ProcessIdentity) -> Path | None:
        try:
            group = _cgroups.group_of(identity.pid)
        except OSError:
            return None
        return group if group is not None and group.name in (identity.tag, f"{identity.tag}.scope") else None

    # Sockets

    async def connect_unix(self, path: Path, timeout_s: float) -> trio.SocketStream:
        """Connect to a Unix stream socket. Paths of any length: the limit of 108 bytes is walked around.

        Raises OSError when nobody listens, trio.TooSlowError after `timeout_s`.
        """
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.setblocking(False)
                with trio.fail_after(timeout_s):
                    while True:
                        await trio.lowlevel.checkpoint()
                        try:
                            sock.connect(f"/proc/self/fd/{directory}/{path.name}")
                            return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
                        except BlockingIOError:
                            # As many wait to be accepted as may. Nothing tells when there is room again; and trio 0.35
                            # takes such a socket for a connected one.
                            await trio.sleep(_FULL_S)
            except BaseException:
                sock.close()
                raise
        finally:
            os.close(directory)

    async def open_connection(self, path: Path, timeout_s: float) -> AbstractContextManager[int]:
        """A descriptor that is connected to a Unix stream socket, for as long as the block lasts. Raises as
        `connect_unix`."""
        stream = await self.connect_unix(path, timeout_s)

        @contextmanager
        def block() -> Iterator[int]:
            with stream.socket as sock:
                yield sock.fileno()

        return block()

    @contextmanager
    def open_tap(self, name: str) -> Iterator[int]:
        """Opens an existing tap that nobody has open, for the length of the block. Raises OSError."""
        socket.if_nametoindex(name)  # a missing tap would be created
        tun = open_tap(name)
        try:
            yield tun
        finally:
            os.close(tun)

    def listen_unix(self, path: Path, *, mode: int = 0o600, backlog: int = 16) -> trio.SocketListener:
        """Listen on a Unix stream socket, in place of what is there. Paths of any length; the name stays behind when
        the listener is closed. Raises OSError."""
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sock = socket.socket(socket.AF_UNIX)
        try:
            path.unlink(missing_ok=True)
            # What bind makes takes its mode from here, so that it never has another one.
            os.fchmod(sock.fileno(), mode)
            sock.bind(f"/proc/self/fd/{directory}/{path.name}")
            sock.listen(backlog)
            return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        except BaseException:
            sock.close()
            raise
        finally:
            os.close(directory)

    def unread(self, stream: trio.SocketStream) -> tuple[int, int]:
        """Bytes of a Unix stream that the other side has not read yet, and that we have not. Raises OSError."""
        queues = []
        for request in (termios.TIOCOUTQ, termios.FIONREAD):
            answer = fcntl.ioctl(stream.socket.fileno(), request, bytes(4))
            queues.append(int.from_bytes(answer, sys.byteorder))
        return queues[0], queues[1]

    def has_vsock(self) -> bool:
        """Whether guests can be given a vhost-vsock device."""
        return os.access("/dev/vhost-vsock", os.R_OK | os.W_OK)

    async def connect_vsock(self, cid: int, port: int, timeout_s: float) -> trio.SocketStream:
        """Connect to a port of a guest by vsock. Raises OSError, trio.TooSlowError."""
        sock = trio.socket.socket(trio.socket.AF_VSOCK, trio.socket.SOCK_STREAM)
        try:
            with trio.fail_after(timeout_s):
                await sock.connect((cid, port))
            return trio.SocketStream(sock)
        except BaseException:
            sock.close()
            raise

    # Files

    async def mkdir(self, path: Path, mode: int = 0o700) -> None:
        """Make a directory, and its parents, unless it is there: then it must be ours (see `make_own_directory`).
        `mode` is what it gets whatever the umask. Raises OSError."""
        warning = await trio.to_thread.run_sync(make_own_directory, path, mode)
        if warning is not None:
            _logger.warning("%s", warning)

    async def remove_tree(self, path: Path) -> None:
        """Remove a directory and all in it, or a file. Follows no link; nothing there is no error. Raises OSError, also
        for what is not ours."""
        self.check_removable(path)

        def remove() -> None:
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except FileNotFoundError:
                pass

        await trio.to_thread.run_sync(remove)

    async def remove_file(self, path: Path) -> None:
        """Remove one file; nothing there is no error. Raises OSError, also for what is not ours."""
        self.check_removable(path)
        await trio.to_thread.run_sync(lambda: path.unlink(missing_ok=True))

    async def read_bytes(self, path: Path, limit: int = _READ_LIMIT) -> bytes:
        """The first `limit` bytes of a file. Raises OSError."""

        def read() -> bytes:
            with path.open("rb") as file:
                return file.read(limit)

        return await trio.to_thread.run_sync(read)

    async def read_tail(self, path: Path, limit: int) -> bytes:
        """The last `limit` bytes of a file, fewer where it is shorter. Raises OSError."""

        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
                return file.read(limit)

        return await trio.to_thread.run_sync(read)

    async def write_bytes(self, path: Path, data: bytes, mode: int = 0o600) -> None:
        """Replace a file by one with this content, all or nothing, also over a power cut. Raises OSError."""

        def write() -> None:
            fresh = path.with_name(f".{path.name}.{self.new_id()}")
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
                fresh.replace(path)
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise
            self.sync_directory(path.parent)

        await trio.to_thread.run_sync(write)

    async def put_in_place(self, fresh: Path, path: Path) -> None:
        """Give a finished file its name, in place of what has that name, once it is on the disk; the name is on the
        disk too when this returns. Both in the same directory. A directory whose files are on the disk can be given its
        name likewise, if nothing has it. Raises OSError."""

        def put() -> None:
            fd = os.open(fresh, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            fresh.replace(path)
            self.sync_directory(path.parent)

        await trio.to_thread.run_sync(put)

    async def move_directory(self, path: Path, to: Path) -> None:
        """Give a directory another name on its file system, which nothing has that is not empty. What is open in it, or
        bound, goes with it. Raises OSError."""
        await trio.to_thread.run_sync(os.rename, path, to)

    async def copy_file(self, source: Path, target: Path, mode: int = 0o600) -> None:
        """Copy the content of a file to a new one. It is not on the disk before `put_in_place`. Not cancelled half-way,
        so for small files. Raises OSError, also when `target` is there."""

        def copy() -> None:
            with source.open("rb") as reader:
                fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
                with os.fdopen(fd, "wb", buffering=0) as writer:
                    size, done = os.fstat(reader.fileno()).st_size, 0
                    while done < size:
                        sent = os.sendfile(writer.fileno(), reader.fileno(), done, size - done)
                        if not sent:
                            break
                        done += sent

        await trio.to_thread.run_sync(copy)

    async def copy_sparse(self, source: Path, target: Path, mode: int = 0o600) -> None:
        """Copy a large file to a new one, by reference where the file system can, else without its holes, in pieces:
        cancelled, it leaves what it has. It is not on the disk before `put_in_place`. Raises OSError, also when
        `target` is there."""
        with _descriptor(source, os.O_RDONLY) as reader:
            await self._copy_pieces(reader, target, mode)

    async def copy_mapped_file(self, identity: ProcessIdentity, size: int, target: Path, mode: int = 0o600) -> None:
        """Copy the file of which a process has its one private mapping of `size` bytes to a new one, as `copy_sparse`
        does; what the process has written there is not in it. Raises ProcessGone, OSError; PermissionError where the
        process may not be looked into."""
        with self.open_process(identity) as process:
            mapping = await trio.to_thread.run_sync(_memory.find_private_mapping, process.pid, size)
            with _closing(mapping.open_file()) as source:
                _check_alive(process)
                await self._copy_pieces(source, target, mode)

    async def copy_own_pages(self, identity: ProcessIdentity, size: int, target: Path) -> int:
        """Write what a process has in the pages of that mapping that it has written to over the same places of
        `target`, in pieces; how many bytes that is. Raises as `copy_mapped_file`."""
        with self.open_process(identity) as process:
            mapping = await trio.to_thread.run_sync(_memory.find_private_mapping, process.pid, size)
            with (
                _closing(mapping.open_memory()) as memory,
                _closing(mapping.open_pagemap()) as pagemap,
                _descriptor(target, os.O_WRONLY) as copy,
            ):
                _check_alive(process)
                at = copied = 0
                try:
                    while at < size:
                        at, more = await trio.to_thread.run_sync(
                            _memory.copy_own_piece, mapping, memory, pagemap, copy, at
                        )
                        copied += more
                except ProcessLookupError as error:
                    raise ProcessGone(str(error)) from error
                return copied

    async def _copy_pieces(self, reader: int, target: Path, mode: int) -> None:
        with _descriptor(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode) as writer:
            if await trio.to_thread.run_sync(_share_blocks, reader, writer):
                return
            size = os.fstat(reader).st_size
            os.ftruncate(writer, size)
            at = 0
            while at < size:
                at = await trio.to_thread.run_sync(_memory.copy_piece, reader, writer, at, size)

    async def keep_tail(self, path: Path, limit: int) -> bool:
        """Cut a file down to nothing when it is larger than `limit` bytes; whether it was.

        Meant for a file that another process appends to. What it held is dropped: to keep the end of it would race
        with the writer.
        """

        def cut() -> bool:
            try:
                if path.stat().st_size <= limit:
                    return False
                os.truncate(path, 0)
            except FileNotFoundError:
                return False
            return True

        return await trio.to_thread.run_sync(cut)

    async def make_fifo(self, path: Path, mode: int = 0o600) -> None:
        """Make a named pipe unless one is there. Raises OSError, FileExistsError when the path is something else."""

        def make() -> None:
            try:
                os.mkfifo(path, mode)
            except FileExistsError:
                if not path.is_fifo():
                    raise

        await trio.to_thread.run_sync(make)

    async def allocate_file(self, path: Path, size: int, mode: int = 0o600, *, reserve: bool = True) -> None:
        """Make an empty file of `size` bytes, in place of what is there. With `reserve` all of its space is taken now,
        so that a later write to a mapping of it cannot fail (SIGBUS).

        Raises OSError, with ENOSPC when the space is not there; then no file is left.
        """

        def allocate() -> None:
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            try:
                os.ftruncate(fd, size)
                if reserve:
                    os.posix_fallocate(fd, 0, size)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)

        await trio.to_thread.run_sync(allocate)

    def unbacked_space(self, path: Path) -> int:
        """Bytes that a file, or those in a directory, still lack to be as large as they say; their owners may write
        there. 0 where nothing is. Follows no link."""
        try:
            figures = path.lstat()
            if stat.S_ISDIR(figures.st_mode):
                return sum(self.unbacked_space(inner) for inner in path.iterdir())
            return max(0, figures.st_size - figures.st_blocks * 512) if stat.S_ISREG(figures.st_mode) else 0
        except (FileNotFoundError, NotADirectoryError):
            # It goes while we look.
            return 0

    def free_space(self, path: Path) -> int:
        """Bytes that may still be written to the file system that holds `path`. Raises OSError."""
        figures = os.statvfs(path)
        return figures.f_bavail * figures.f_frsize

    def disk_usage(self, path: Path) -> int:
        """Bytes on the disk of a file or of all that lies in a directory; 0 where nothing is. Follows no link."""
        try:
            figures = path.lstat()
            used = figures.st_blocks * 512
            if stat.S_ISDIR(figures.st_mode):
                used += sum(self.disk_usage(inner) for inner in path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            # It goes while we look.
            return 0
        return used

    def exists(self, path: Path) -> bool:
        """Whether there is something at `path`."""
        return path.exists()

    def file_size(self, path: Path) -> int:
        """The size in bytes. Raises OSError."""
        return path.stat().st_size

    def fingerprint(self, path: Path) -> str:
        """Another one once a file was written to or replaced: inode, size and time of modification. Raises OSError."""
        figures = path.stat()
        return f"{figures.st_ino}.{figures.st_size}.{figures.st_mtime_ns}"

    def list_directory(self, path: Path) -> list[str]:
        """The names in a directory, sorted. Raises OSError."""
        return sorted(entry.name for entry in path.iterdir())

    def open_file(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """A descriptor, never inherited and never a terminal's master. `flags` as for os.open. Raises OSError."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY, mode)

    def open_pipe(self, path: Path) -> trio.lowlevel.FdStream:
        """The writing end of a named pipe, to be closed by the caller. Raises OSError, with ENXIO when nobody reads."""
        return trio.lowlevel.FdStream(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))

    def reserve_space(self, path: Path, size: int) -> None:
        """Make a file that takes `size` bytes of the disk, or none. Raises OSError."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def close_file(self, fd: int) -> None:
        os.close(fd)

    def read_at(self, fd: int, limit: int, offset: int) -> bytes:
        """Up to `limit` bytes from `offset`; empty at the end. Raises OSError."""
        return os.pread(fd, limit, offset)

    def write(self, fd: int, data: bytes) -> int:
        """Write where the descriptor stands; how many bytes were taken. Raises OSError."""
        return os.write(fd, data)

    def write_at(self, fd: int, data: bytes, offset: int) -> int:
        """Write at a place of a file, wherever the descriptor stands; how many bytes were taken. Raises OSError."""
        return os.pwrite(fd, data, offset)

    def sync_file(self, fd: int) -> None:
        """Return once the file's data is on the disk. Raises OSError."""
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        """Return once the names in a directory are on the disk. Raises OSError."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, path: Path, to: Path) -> None:
        """Give a file another name in its directory, in place of what has that name; on the disk when this returns.
        Raises OSError."""
        path.replace(to)
        self.sync_directory(to.parent)

    def unlink(self, path: Path) -> None:
        """Remove one file in place; nothing there is no error. Raises OSError, also for what is not ours."""
        self.check_removable(path)
        path.unlink(missing_ok=True)

    def punch_hole(self, fd: int, start: int, length: int) -> bool:
        """Give the space of a range back while the file keeps its size; whether the file system can do that.

        The range reads as zeros afterwards. Raises OSError for anything but "not supported".
        """
        flags = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        while _libc.fallocate(fd, flags, start, length) != 0:
            code = ctypes.get_errno()
            if code == errno.EOPNOTSUPP:
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return True

    @contextmanager
    def watch(self, path: Path) -> Iterator[FileWatch]:
        """Watch a file for writes, or a directory for new names: `with host.watch(path) as watch: await watch.wait()`.

        It must exist. Raises OSError.
        """
        with self._watches.open(path) as watch:
            yield watch

    async def run_blocking(self, call: Callable[..., T], *args: object) -> T:
        """Run a call that blocks on the disk in a worker thread. It is not cancelled half-way."""
        return await trio.to_thread.run_sync(call, *args)

    # The machine

    def memory_total_mb(self) -> int:
        """The machine's memory."""
        return _meminfo().get("MemTotal", 0) // 1024

    def memory_available_mb(self) -> int:
        """Memory that programs can still have without swapping, in MiB."""
        return _meminfo().get("MemAvailable", 0) // 1024

    def memory_to_spare_mb(self, directory: Path) -> int:
        """Likewise, less what the files in a directory in RAM may still grow by."""
        return max(0, self.memory_available_mb() - self.unbacked_space(directory) // 2**20)

    def room_in_memory_mb(self, directory: Path) -> int:
        """What a new file in that directory, which need not be there, may take, in MiB. Raises OSError."""
        there = directory if self.exists(directory) else directory.parent
        free = (self.free_space(there) - self.unbacked_space(directory)) // 2**20
        return max(0, min(free, self.memory_to_spare_mb(directory)))

    def figures(self) -> HostFigures:
        """What the machine is doing, from /proc. One caller, as its CPU figure is since the call before."""
        with (_PROC / "stat").open() as file:
            ticks = [int(figure) for figure in file.readline().split()[1:9]]
        total, idle = sum(ticks), ticks[3] + ticks[4]
        total_before, idle_before = self._cpu_before
        self._cpu_before = (total, idle)
        passed = total - total_before
        busy = 100.0 * (1.0 - (idle - idle_before) / passed) if passed > 0 else 0.0
        memory = _meminfo()
        return HostFigures(
            cpu_percent=round(min(100.0, max(0.0, busy)), 1),
            memory_total_mb=memory.get("MemTotal", 0) // 1024,
            memory_available_mb=memory.get("MemAvailable", 0) // 1024,
        )

    def monotonic(self) -> float:
        """Seconds on a clock that does not jump, for measuring; deadlines use Trio's clock."""
        return time.monotonic()


@contextmanager
def _file_of(data: bytes) -> Iterator[int]:
    """A file in memory, for a program to read: unlike a pipe it needs nobody to feed it."""
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _descriptor(path: Path, flags: int, mode: int = 0o600) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def _why_no_users(directories: Sequence[Path]) -> str | None:
    if not _sandbox.can_have_users():
        return "it is not known how, on this kind of processor"
    if os.geteuid() != 0:
        return "volantd does not run as root"
    has = _sandbox.capabilities()
    lacking = [name for name, number in _sandbox.NEEDED_CAPABILITIES.items() if not has >> number & 1]
    if lacking:
        return f"volantd lacks {', '.join(lacking)}"
    for directory in directories:
        if (closed := _sandbox.way_to(directory)) is not None:
            return f"{closed} lets no other user through to {directory}: chmod o+x {closed}"
        if not _sandbox.takes_access_lists(directory):
            return f"the file system of {directory} has no access lists (POSIX ACL)"
    return None


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _check_alive(process: Process) -> None:
    """Its number is its own: what was opened by it is, too. :raises ProcessGone:"""
    if process.exited:
        raise ProcessGone(f"process {process.pid} has ended")


def _share_blocks(source: int, target: int) -> bool:
    """Make a file another one's copy that costs no room until one of them is written to; whether that can be."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


def _tokens(cmdline: bytes) -> list[str]:
    return [token.decode("utf-8", "surrogateescape") for token in _TOKENS.split(cmdline) if token]


def _cmdline(pid: int) -> bytes:
    return (_PROC / str(pid) / "cmdline").read_bytes()


def _stat(pid: int) -> tuple[int, int, str]:
    """Start time in clock ticks since boot, session id and state of a process. Raises OSError, ValueError."""
    # The second field is the name in brackets, and may hold spaces and brackets itself.
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return int(fields[19]), int(fields[3]), fields[0]


def _real_user(pid: int) -> int:
    """Who has started a process. What it may by now is another matter: anybody can run a program that is setuid, with
    arguments of their choice. Raises OSError, ValueError."""
    for line in (_PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[1])
    raise ValueError(f"the kernel does not say whose process {pid} is")


def _process_memory(rollup: str) -> ProcessMemory:
    figures = {}
    for line in rollup.splitlines()[1:]:
        name, _, rest = line.partition(":")
        figures[name] = int(rest.split()[0])
    return ProcessMemory(
        rss_kb=figures["Rss"],
        pss_kb=figures["Pss"],
        private_kb=figures["Private_Clean"] + figures["Private_Dirty"],
        shared_kb=figures["Shared_Clean"] + figures["Shared_Dirty"],
    )


def _meminfo() -> dict[str, int]:
    figures = {}
    for line in (_PROC / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        figures[name] = int(rest.split()[0])
    return figures
