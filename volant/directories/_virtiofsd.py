"""Runs virtiofsd: a process for each directory of a VM, which opens files of the host for the guest.

The daemon creates the socket, and virtiofsd and the hypervisor inherit its two ends. virtiofsd serves one connection
and ends with it. So it ends with its hypervisor, even without a daemon, or with a daemon that is killed before it has
started the hypervisor.

It runs in the sandbox of the daemon's other helpers, as the directory's owner and without capabilities: a guest has the
owner's rights there. Rejected: virtiofsd's own sandbox, which needs root, or user namespaces and tables of ids that few
hosts have; and as root a guest could make programs of root on the host.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import errorcode
from pathlib import Path

import msgspec
import trio

from volant.host import (
    PROGRAM_ENVIRONMENT,
    Host,
    OpenDirectory,
    ProcessGone,
    ResourceLimits,
    Sandbox,
    bound_log,
)
from volant.model import DirectoryMount, Problem, ProcessIdentity, VmRow

from ._allowed import AllowedDirectory, check_allowed

PROGRAM = "/usr/libexec/virtiofsd"
_PLACES = ("/usr/libexec", "/usr/lib/virtiofsd", "/usr/lib/qemu")
_INSTALL = "run `apt-get install virtiofsd`, then start the VM again"
_ROOT = 0
_OPEN_S, _END_S = 5.0, 10.0
_CLOSING_S = 2.0
"""How long a virtiofsd may take to end after its hypervisor."""
_FILES = 262_144
"""Maximum files that a guest may have looked up at a time. Each is an open file of virtiofsd, and takes about 1 KiB of
kernel memory."""
_OWN_MB = 512
"""Memory for virtiofsd and `_FILES`. It may also be the first to access a page of the guest's memory, which then counts
as its own."""
_LOG_TAIL = 4096
_READ_ALWAYS = (Path("/proc/sys/fs/nr_open"),)


class DirectoryFailed(Exception):
    """A VM can't have its directories. `code` is stable; the text says what failed, why, and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def virtiofsd_argv(program: str, *, tag: str, listener: int, directory: int, files: int, read_only: bool) -> list[str]:
    """Returns the command line.

    :param tag: the process tag. QEMU does not show it to the guest.
    :param listener: the inherited descriptor of a socket that listens
    :param directory: the inherited descriptor of the directory
    :param files: the maximum number of open files
    """
    argv = [
        *(program, "--tag", tag, "--fd", str(listener), "--shared-dir", f"/proc/self/fd/{directory}"),
        *("--sandbox", "none", "--seccomp", "kill", "--cache", "auto", "--rlimit-nofile", str(files)),
        *("--log-level", "warn"),
    ]
    return [*argv, "--readonly"] if read_only else argv


def find_program() -> str | None:
    """Returns the path of virtiofsd; None if it is not installed."""
    return shutil.which("virtiofsd", path=":".join((*_PLACES, PROGRAM_ENVIRONMENT["PATH"])))


def directory_socket(runtime_dir: Path, vm_id: int, number: int) -> Path:
    """Returns the path of the socket for a VM's directory."""
    return runtime_dir / "directories" / f"{vm_id}.{number}.sock"


def directory_tag(number: int) -> str:
    """Returns the name of a directory's device in its guest."""
    return f"directory{number}"


class Virtiofsd(msgspec.Struct, frozen=True, kw_only=True):
    """Manages the virtiofsd processes of one daemon."""

    host: Host
    runtime_dir: Path
    instance: str
    allowed: tuple[AllowedDirectory, ...]
    user_of: Callable[[str, int], int | None]
    """Returns the user of a hypervisor, by its tag and its VM's id; None for the daemon's own."""
    places: tuple[Path, ...] = ()
    """The daemon's own directories, which VMs must not share."""
    obstacle: str | None = None
    """Why no VM can have a directory of the host."""

    async def check(self, mounts: Sequence[DirectoryMount], *, vm: str | None = None) -> None:
        """Checks mounts. :raises Problem: 403, one is not allowed; 409, one is missing, or this host can't have any."""
        for mount in mounts:
            opened = await self._open(mount, vm)
            self.host.descriptors.close(opened.fd)

    async def _open(self, mount: DirectoryMount, vm: str | None) -> OpenDirectory:
        """Opens a mount's directory. :raises Problem: see `check`."""
        base = check_allowed(mount, self.allowed, self.places).path
        if self.obstacle is not None:
            raise Problem(
                409, "host-directory-refused", f"no VM can have a directory of this host: {self.obstacle}",
                field="volumes", vm=vm, hint="`volar setup --check` on the host shows what is missing",
            )  # fmt: skip
        try:
            return await self.host.descriptors.open_directory(base, Path(mount.source), _OPEN_S)
        except OSError as error:
            raise _unusable(mount, error, vm) from error

    async def start(self, row: VmRow) -> list[ProcessIdentity]:
        """Starts and returns the virtiofsd of each directory of a VM, in place of any that still run.

        :raises DirectoryFailed: `host_directory_denied`, `host_directory_missing`, `host_directory_refused`,
            `virtiofsd_missing`, `virtiofsd_failed`.
        """
        if not row.directories:
            return []
        await self.end(row.id)
        started = []
        for number, mount in enumerate(row.directories):
            try:
                opened = await self._open(mount, row.name)
            except Problem as problem:
                raise DirectoryFailed(problem.code.replace("-", "_"), problem.detail) from problem
            try:
                started.append(await self._start(row, number, mount, opened))
            finally:
                self.host.descriptors.close(opened.fd)
        return started

    async def _start(self, row: VmRow, number: int, mount: DirectoryMount, opened: OpenDirectory) -> ProcessIdentity:
        """Starts one virtiofsd. :raises DirectoryFailed:"""
        host, log = self.host, self._log(row.id, number)
        try:
            await host.files.mkdir(log.parent)
            await host.files.mkdir(self._nothing)
            with host.sockets.listen_for(directory_socket(self.runtime_dir, row.id, number)) as listener:
                identity = await host.processes.spawn(
                    virtiofsd_argv(
                        find_program() or PROGRAM,
                        tag=self._tag(row.id, number),
                        listener=listener,
                        directory=opened.fd,
                        files=min(_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
                        read_only=mount.read_only,
                    ),
                    tag=self._tag(row.id, number),
                    env=PROGRAM_ENVIRONMENT,
                    cwd=self._nothing,
                    stdout_path=log,
                    sandbox=self._sandbox(row, mount, opened),
                    descriptors=(listener, opened.fd),
                )
        except FileNotFoundError as error:
            if error.filename == PROGRAM:
                raise DirectoryFailed("virtiofsd_missing", f"virtiofsd is not installed: {_INSTALL}") from None
            raise DirectoryFailed("virtiofsd_failed", f"virtiofsd can't be started: {error}") from error
        except OSError as error:
            raise DirectoryFailed(
                "virtiofsd_failed", f"virtiofsd can't be started for {mount.source}: {error}"
            ) from error
        await host.limits.apply(
            identity,
            f"directory {number} of VM {row.name}",
            ResourceLimits(memory_mb=row.memory_mb + _OWN_MB, cpus=1, weight=100, tasks=16),
        )
        return identity

    def _sandbox(self, row: VmRow, mount: DirectoryMount, opened: OpenDirectory) -> Sandbox:
        user, group = self.user_of(row.tag, row.id), None
        if user is not None and opened.owner != _ROOT:
            user, group = opened.owner, opened.group
        # By the descriptor, so that it is this directory whatever has its name now.
        tree = (Path(f"/proc/self/fd/{opened.fd}"),)
        return Sandbox(
            user=user,
            group=group,
            landlock=True,
            read=(*_READ_ALWAYS, *(tree if mount.read_only else ())),
            shared=() if mount.read_only else tree,
            no_connect=True,
        )

    async def lost(self, row: VmRow) -> str:
        """Waits until the virtiofsd of a VM's directory has ended. Returns its directory and its last output."""
        running = {identity.tag: identity for identity in await self._find(row.id)}
        ended: list[str] = []

        async def watch(number: int, mount: DirectoryMount) -> None:
            with (
                suppress(KeyError, ProcessGone),
                self.host.processes.open(running[self._tag(row.id, number)]) as process,
            ):
                await process.wait()
            ended.append(
                f"virtiofsd, which serves {mount.source} of the host, has ended{await self._said(row.id, number)}"
            )
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for number, mount in enumerate(row.directories):
                nursery.start_soon(bound_log, self.host, self._log(row.id, number))
                nursery.start_soon(watch, number, mount)
        return ended[0]

    async def explain(self, row: VmRow, started: Sequence[ProcessIdentity]) -> str | None:
        """Returns the virtiofsd that prevented a hypervisor from starting, with its last output; None if none did.

        The hypervisor has ended, and with it, without a failure, each virtiofsd that worked.
        """
        for number, (mount, identity) in enumerate(zip(row.directories, started, strict=True)):
            name = f"virtiofsd for {mount.source} of the host"
            with suppress(ProcessGone), self.host.processes.open(identity) as process:
                with trio.move_on_after(_CLOSING_S):
                    if status := await process.wait():
                        return f"{name} has ended with status {status}{await self._said(row.id, number)}"
                if not process.exited:
                    return f"{name} does not answer{await self._said(row.id, number)}"
        return None

    async def end(self, vm_id: int) -> None:
        """Ends a VM's virtiofsd processes and removes their files. :raises DirectoryFailed: `virtiofsd_failed`."""
        host = self.host
        try:
            with trio.fail_after(_END_S):
                await host.processes.end(await self._find(vm_id))
            directory = self._nothing.parent
            if host.files.exists(directory):
                for name in host.files.names(directory):
                    owner, _, number = Path(name).stem.partition(".")
                    if owner == str(vm_id):
                        # It may have ended with its hypervisor just now, and is found no more.
                        await host.limits.remove_empty(self._tag(vm_id, number))
                        await host.files.remove(directory / name)
        except (OSError, trio.TooSlowError) as error:
            raise DirectoryFailed(
                "virtiofsd_failed", f"virtiofsd can't be ended: {str(error) or 'it does not end'}"
            ) from error

    async def _find(self, vm_id: int) -> list[ProcessIdentity]:
        """Returns a VM's virtiofsd processes. Any user can start a process with their tags, but only the daemon can
        pass it the log, which only the daemon can open."""
        found, prefix = [], self._tag(vm_id, "")
        for identity in await self.host.processes.scan(prefix, of_anybody=True):
            with suppress(ProcessGone):
                number = identity.tag.removeprefix(prefix)
                if number.isdecimal() and (
                    self.host.proc.is_ours(identity) or self.host.proc.has_open(identity, self._log(vm_id, int(number)))
                ):
                    found.append(identity)
        return found

    async def _said(self, vm_id: int, number: int) -> str:
        with suppress(OSError):
            tail = await self.host.files.read_tail(self._log(vm_id, number), _LOG_TAIL)
            lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
            if lines:
                return f"; its last output: {' / '.join(lines[-3:])[-500:]}"
        return ""

    @property
    def _nothing(self) -> Path:
        """Returns an empty directory for the processes to work in, as a sandbox allows access to it."""
        return self.runtime_dir / "directories" / "empty"

    def _log(self, vm_id: int, number: int) -> Path:
        return directory_socket(self.runtime_dir, vm_id, number).with_suffix(".log")

    def _tag(self, vm_id: int, number: int | str) -> str:
        # A hypervisor's tag has no `d.`.
        return f"volant-{self.instance}-d.{vm_id}.{number}"


def _unusable(mount: DirectoryMount, error: OSError, vm: str | None) -> Problem:
    why = {
        "ELOOP": "a part of the path is a symbolic link; name the directory that it leads to",
        "ENOENT": "it does not exist",
        "ENOTDIR": "it is not a directory",
    }.get(errorcode.get(error.errno or 0, ""), error.strerror or str(error))
    return Problem(
        409, "host-directory-missing", f"the host's directory {mount.source} can't be used: {why}",
        field="volumes", vm=vm, hint="make it, or name another one",
    )  # fmt: skip
