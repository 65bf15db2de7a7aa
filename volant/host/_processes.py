"""The facet that starts, finds and ends processes.

**An identity is more than a pid.** A restarted daemon finds a number in its row, which may belong to another process by
then. So an identity consists of pid, start time, boot id and a tag on the command line. A handle opens a pidfd first
and compares afterwards, so it signals and waits for the compared process.

**Nothing here polls**, except that `spawn()` waits for the command line. A pidfd becomes readable when its process
ends, even if the process is not a child of the daemon.

**Children are reaped here.** The first waiter takes the exit status, and every other handle of the same child sees it
too. An unwatched child is reaped by the next `spawn()` or `scan()`, and its status kept for a handle that is opened
later. `subprocess.Popen` is only used for its careful fork and exec, and dropped at once: two waiters for one child
would steal its status from each other.
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import trio

from volant.model import ProcessIdentity

from . import _priorities, _procfs
from ._own import Ownership
from ._procfs import ProcessGone
from ._sandbox import Sandbox, start_sandboxed

_TAG = re.compile(r"[A-Za-z0-9._:@-]{4,100}")
_STATUSES_KEPT = 256
"""Maximum exit statuses of children that are kept until they are requested."""
_KILLED_S = 5.0
"""Maximum wait for a short program after SIGKILL."""
_EXEC_S, _EXEC_AGAIN_S = 5.0, 0.001
"""Maximum wait for the command line of a new process, which takes up to 15 ms on a busy host, and the interval of
checks."""


class Process(Protocol):
    """A handle of one process, started by the daemon or adopted. It is a context manager; closing it does not affect
    the process."""

    @property
    def identity(self) -> ProcessIdentity: ...

    @property
    def pid(self) -> int: ...

    @property
    def exited(self) -> bool:
        """Whether the process has ended."""

    async def wait(self) -> int | None:
        """Waits for the end. Several tasks may wait at once.

        Returns the exit status, 0 to 255, or minus the signal number; None if it is unknown, as the process is not a
        child of the daemon.
        """

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Sends a signal, unless the process has ended. Raises PermissionError if it belongs to another user."""

    def close(self) -> None: ...

    def __enter__(self) -> Process: ...

    def __exit__(self, *args: object) -> None: ...


class Processes(Protocol):
    def boot_id(self) -> str:
        """Returns the kernel's id of this boot. Pids and start times are only valid within it."""

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
        """Starts a process that outlives the daemon: with its own session, without stdin and core dumps, and of the
        daemon's descriptors only with `descriptors`, under the same numbers. `sandbox` has its rights; None for the
        daemon's. Until `Limits.apply` the kernel ends it first if the host runs out of memory.

        `tag` must already be on the command line, as a whole argument or between `,` and `=` of one: 4 to 100 letters,
        digits and `._:@-`. Stdout and stderr are appended to `stdout_path` (created 0600); the caller bounds its size
        with `Files.empty_if_larger`. Can't be cancelled in the middle. When it returns, `scan` finds the process, also
        from another process.

        Raises OSError if the program cannot be started or the sandbox can't be set up, ValueError for a bad tag.
        """

    async def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        timeout_s: float,
        output_limit: int = 65536,
        until: bytes | None = None,
        stdin: bytes = b"",
        sandbox: Sandbox | None = None,
    ) -> tuple[int, bytes]:
        """Runs a short program to its end, and returns its exit status (minus the signal number), and stdout and stderr
        together.

        It is killed after `timeout_s`, beyond `output_limit` bytes of output, and when its output contains `until`. For
        `sandbox` see `spawn`. Raises OSError if it cannot be started or the sandbox can't be set up, trio.TooSlowError.
        """

    async def scan(self, tag_prefix: str, *, of_anybody: bool = False) -> list[ProcessIdentity]:
        """Returns every living process whose tag begins with this prefix; none if such tags don't belong to the daemon.
        Reads all of /proc.

        Any user can start a process with a tag. So only processes of the daemon's user and of hypervisors' users count,
        unless `of_anybody` is set. Only session leaders count, like those of `spawn`, so that `pgrep` for a tag is not
        mistaken for the tagged process. Raises OSError if the host has no descriptor or memory left.
        """

    def open(self, identity: ProcessIdentity) -> Process:
        """Opens a handle of the process with this identity. An ended child can be opened until its status was read.

        :raises ProcessGone: there is none: another boot, another start time, a tag that does not belong to the daemon,
            or another command line, unless it runs as a hypervisor's user.
        :raises OSError: the host has no descriptor or memory left, so its state is unknown.
        """

    async def find(self, tag: str) -> ProcessIdentity | None:
        """Returns the oldest living process with exactly this tag. Reads all of /proc."""
        found = [identity for identity in await self.scan(tag) if identity.tag == tag]
        return min(found, key=lambda identity: identity.start_time, default=None)

    async def end(self, identities: Iterable[ProcessIdentity]) -> None:
        """Kills processes and waits until all have ended. The caller sets the deadline. Raises OSError."""
        with ExitStack() as stack:
            handles = []
            for identity in identities:
                with suppress(ProcessGone):
                    handles.append(stack.enter_context(self.open(identity)))
            # All are killed before the first wait, as one may be slow to end.
            for process in handles:
                process.kill()
            for process in handles:
                await process.wait()

    async def end_all(self, tag: str, known: ProcessIdentity | None = None) -> None:
        """Kills every process with exactly this tag, and `known`, whatever its command line is by now, and waits until
        all have ended. The caller sets the deadline. Reads all of /proc. Raises OSError."""
        found = {identity for identity in await self.scan(tag) if identity.tag == tag}
        if known is not None:
            found.add(known)
        await self.end(found)


class _Child:
    """A process that the daemon started, and its exit status once it was reaped."""

    __slots__ = ("pidfd", "reaped", "seen", "start_time", "status")

    def __init__(self, pidfd: int, start_time: int) -> None:
        self.pidfd = pidfd
        self.start_time = start_time
        self.reaped = False
        self.seen = False
        self.status: int | None = None

    def reap(self) -> None:
        """Takes the exit status if the process has ended. Never blocks."""
        if self.reaped:
            return
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            # SIGCHLD is ignored in this process, or other code reaped it: the status is lost, the end is not.
            if not _is_readable(self.pidfd):
                return
        else:
            if result is None:
                return
            self.status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        self.reaped = True


class _PidfdProcess(Process):
    __slots__ = ("_child", "_identity", "_pidfd")

    def __init__(self, identity: ProcessIdentity, pidfd: int, child: _Child | None) -> None:
        self._identity = identity
        self._pidfd = pidfd
        self._child = child

    @property
    def identity(self) -> ProcessIdentity:
        return self._identity

    @property
    def pid(self) -> int:
        return self._identity.pid

    @property
    def exited(self) -> bool:
        return _is_readable(self._pidfd)

    async def wait(self) -> int | None:
        # A descriptor of its own for each waiter: Trio lets only one task wait on a descriptor.
        own = os.dup(self._pidfd)
        try:
            await trio.lowlevel.wait_readable(own)
        finally:
            # The pidfd is still open elsewhere, so epoll would keep this descriptor, and report the end of this process
            # to a task that waits for another one on a descriptor of the same number.
            trio.lowlevel.notify_closing(own)
            os.close(own)
        if self._child is None:
            return None
        self._child.reap()
        self._child.seen = True
        return self._child.status

    def kill(self, signum: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signum)

    def close(self) -> None:
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> _PidfdProcess:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class LinuxProcesses(Processes):
    def __init__(self, own: Ownership, users: range) -> None:
        """Creates it. `users` are reserved for hypervisors."""
        self._own = own
        self._users = users
        self._children: dict[int, _Child] = {}
        self._boot_id: str | None = None

    def boot_id(self) -> str:
        if self._boot_id is None:
            self._boot_id = (_procfs.PROC / "sys/kernel/random/boot_id").read_text().strip()
        return self._boot_id

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
        if not _TAG.fullmatch(tag) or tag not in _procfs.tokens("\0".join(argv).encode()):
            raise ValueError(f"the tag {tag!r} is malformed or not on the command line")

        def start(output: int) -> subprocess.Popen[bytes]:
            if sandbox is not None:
                return start_sandboxed(argv, env, cwd, output, sandbox, descriptors)
            return subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd, close_fds=True,
                pass_fds=descriptors, start_new_session=True,
            )  # fmt: skip

        self._reap_children()
        pid = await trio.to_thread.run_sync(_start, start, stdout_path)
        # Not reaped yet, so the pid is still its own.
        pidfd = os.pidfd_open(pid)
        start_time = _procfs.stat(pid).start_time
        self._children[pid] = _Child(pidfd, start_time)
        try:
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        except (ProcessLookupError, PermissionError):
            pass  # it has ended, or changed its user: then it has set its own limits
        return ProcessIdentity(pid=pid, start_time=start_time, boot_id=self.boot_id(), tag=tag)

    def _reap_children(self) -> None:
        ended = []
        for pid, child in self._children.items():
            child.reap()
            if child.reaped:
                ended.append((pid, child))
        unseen = [child for _, child in ended if not child.seen]
        too_many = set(unseen[:-_STATUSES_KEPT])
        for pid, child in ended:
            if child.seen or child in too_many:
                del self._children[pid]
                os.close(child.pidfd)

    async def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        timeout_s: float,
        output_limit: int = 65536,
        until: bytes | None = None,
        stdin: bytes = b"",
        sandbox: Sandbox | None = None,
    ) -> tuple[int, bytes]:
        ours, its = os.pipe2(os.O_CLOEXEC)
        try:
            with _memory_file(stdin) as given:
                popen = await trio.to_thread.run_sync(_start_program, argv, env, cwd, given, its, sandbox)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(its)
        try:
            # Not reaped yet, so the pid is still its own.
            pidfd = os.pidfd_open(popen.pid)
        except OSError:
            os.close(ours)
            popen.kill()
            await trio.to_thread.run_sync(popen.wait, _KILLED_S)
            raise
        output = bytearray()
        try:
            async with trio.lowlevel.FdStream(ours) as stream:
                with trio.fail_after(timeout_s):
                    while data := await stream.receive_some(output_limit):
                        output += data
                        if len(output) > output_limit or (until is not None and until in output):
                            popen.kill()
                            break
                    await trio.lowlevel.wait_readable(pidfd)
                    return popen.wait(), bytes(output[:output_limit])
        finally:
            if popen.returncode is None:
                popen.kill()
                with trio.CancelScope(shield=True), trio.move_on_after(_KILLED_S):
                    await trio.lowlevel.wait_readable(pidfd)
                    popen.wait()
            os.close(pidfd)

    async def scan(self, tag_prefix: str, *, of_anybody: bool = False) -> list[ProcessIdentity]:
        if not self._own.owns(tag_prefix):
            return []
        self._reap_children()
        return await trio.to_thread.run_sync(self._scan, tag_prefix, of_anybody)

    def _scan(self, tag_prefix: str, of_anybody: bool) -> list[ProcessIdentity]:
        found = []
        prefix = tag_prefix.encode()
        for pid in _procfs.pids():
            try:
                command_line = _procfs.command_line(pid)
                if prefix not in command_line:
                    continue
                tokens = _procfs.tokens(command_line)
                tags = [token for token in tokens if token.startswith(tag_prefix) and _TAG.fullmatch(token)]
                if not tags:
                    continue
                stat = _procfs.stat(pid)
                if not of_anybody and not runs_as_ours(pid, self._users):
                    continue
            except (OSError, ValueError) as error:
                _procfs.raise_shortage(error)
                continue
            if stat.session == pid and not stat.is_dead:
                found.append(ProcessIdentity(pid=pid, start_time=stat.start_time, boot_id=self.boot_id(), tag=tags[0]))
        return found

    def open(self, identity: ProcessIdentity) -> Process:
        self._own.check_process(identity)
        pid = identity.pid
        if identity.boot_id != self.boot_id():
            raise ProcessGone(f"process {pid} belongs to another boot of this machine")
        child = self._children.get(pid)
        if child is not None and child.start_time == identity.start_time:
            return _PidfdProcess(identity, os.dup(child.pidfd), child)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            _procfs.raise_shortage(error)
            raise ProcessGone(f"there is no process {pid}") from error
        try:
            self._check(identity)
        except BaseException:
            os.close(pidfd)
            raise
        return _PidfdProcess(identity, pidfd, None)

    def _check(self, identity: ProcessIdentity) -> None:
        """Checks a process. :raises ProcessGone: it is another one, or has ended. :raises OSError: it can't be
        inspected."""
        pid = identity.pid
        try:
            stat = _procfs.stat(pid)
            if stat.start_time != identity.start_time:
                raise ProcessGone(f"process {pid} is another one by now")
            if stat.is_dead:
                raise ProcessGone(f"process {pid} has ended")
            # A hypervisor that a guest has taken over can overwrite its command line. Its user has no other processes.
            tags = _procfs.tokens(_procfs.command_line(pid))
            if identity.tag not in tags and _procfs.real_user(pid) not in self._users:
                raise ProcessGone(f"process {pid} does not carry the tag {identity.tag}")
        except (OSError, ValueError) as error:
            _procfs.raise_shortage(error)
            raise ProcessGone(f"process {pid} has ended") from error


def runs_as_ours(pid: int, users: range) -> bool:
    """Returns whether the daemon's user, or one of `users`, started a process. Raises OSError, ValueError."""
    user = _procfs.real_user(pid)
    return user in (os.getuid(), os.geteuid()) or user in users


def _start(start: Callable[[int], subprocess.Popen[bytes]], stdout_path: Path) -> int:
    output = os.open(stdout_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        popen = start(output)
    finally:
        os.close(output)
    # Popen must neither reap this child nor warn of it when it is collected as garbage.
    popen.returncode = 0
    # It may have ended, and works without.
    with suppress(OSError):
        _priorities.end_first(popen.pid)
    _wait_for_command_line(popen.pid)
    return popen.pid


def _wait_for_command_line(pid: int) -> None:
    """Waits until a new process can be found by its tag. `execve` resumes the parent before the kernel sets the
    arguments, so the command line is empty for a moment."""
    deadline = time.monotonic() + _EXEC_S
    # An error, or the state of a zombie: it has ended.
    with suppress(OSError, ValueError):
        while not _procfs.command_line(pid) and not _procfs.stat(pid).is_dead and time.monotonic() < deadline:
            time.sleep(_EXEC_AGAIN_S)


def _start_program(
    argv: Sequence[str], env: Mapping[str, str], cwd: Path, stdin: int, output: int, sandbox: Sandbox | None
) -> subprocess.Popen[bytes]:
    if sandbox is not None:
        return start_sandboxed(argv, env, cwd, output, sandbox, stdin=stdin)
    return subprocess.Popen(
        list(argv), stdin=stdin, stdout=output, stderr=output, env=dict(env), cwd=cwd, start_new_session=True
    )


@contextmanager
def _memory_file(data: bytes) -> Iterator[int]:
    """Yields a file in memory for a program to read, which, unlike a pipe, needs no task that feeds it."""
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _is_readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))
