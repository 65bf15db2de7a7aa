"""Starts and kills programs in the root filesystem."""

# ruff: noqa: PTH103, PTH112, PTH113, PTH118, PTH123, PTH208 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import signal

from . import _root

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from typing import Any


def base_environment() -> dict[str, str]:
    """Returns the initial environment of every command and workload."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
    }


class SpawnError(Exception):
    """A program could not be started; `code` is one of `agent_types.ExecEnd`'s."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Setting:
    """The environment, user and working directory of programs."""

    def __init__(self, env: dict[str, str], user: str | None, workdir: str, *, makes_workdir: bool) -> None:
        """
        :param env: variables that override those of `base_environment`
        :param user: see `_root.account`; None for root
        :param makes_workdir: whether to create the working directory if it does not exist
        """
        self.env = env
        self.user = user
        self.workdir = workdir
        self.makes_workdir = makes_workdir
        self.secrets: Callable[[], dict[str, str]] = dict
        """Returns variables that override those of `env`."""


def spawn(
    command: list[str], setting: Setting, stdin: int, stdout: int, stderr: int, *, terminal: bool = False
) -> subprocess.Popen[bytes]:
    """Starts a program as the leader of its own session.

    A program without a slash in its name is searched for in the `PATH` of `setting`, and one with a relative path in
    its working directory.

    :param stdin: a descriptor, or `PIPE` or `DEVNULL` of `subprocess`; likewise the other two
    :param terminal: `stdin` is a terminal, and becomes the controlling terminal of the session
    :raises SpawnError: the program does not start
    """
    import subprocess

    user, workdir = setting.user, setting.workdir
    options: dict[str, Any] = {}
    env = base_environment()
    if user is not None:
        try:
            identity, env["HOME"] = _root.account(user)
        except _root.NoSuchUser:
            raise SpawnError("no_such_user", f"there is no user {user}") from None
        options = dict(identity)
    env |= setting.env | setting.secrets()
    if terminal:
        from ._tty import become_controlling

        options["preexec_fn"] = become_controlling
    pipes = _Pipes((stdin, stdout, stderr), options.get("user"))

    def start() -> subprocess.Popen[bytes]:
        if setting.makes_workdir:
            make_directory(workdir)
        try:
            return subprocess.Popen(
                command,
                env=env,
                cwd=workdir,
                stdin=pipes.theirs[0],
                stdout=pipes.theirs[1],
                stderr=pipes.theirs[2],
                bufsize=0,
                start_new_session=True,
                **options,
            )
        except FileNotFoundError:
            program = os.path.join(workdir, command[0])
            if "/" in command[0] and os.path.isdir(workdir) and os.path.isfile(program):
                text = f"{command[0]} can't be executed: the interpreter or the loader that it names does not exist"
                raise SpawnError("not_executable", text) from None
            raise

    try:
        process = _root.inside(start)
    except BaseException as error:
        pipes.abandon()
        raise _spawn_error(error, command[0], workdir) from None
    pipes.hand_over(process)
    try:
        # It has inherited the agent's score. Without memory, the kernel should kill it before the agent.
        with open(f"/proc/{process.pid}/oom_score_adj", "w") as handle:
            handle.write("0")
    except OSError:
        pass
    return process


class _Pipes:
    """The standard streams of a program that is being started.

    Programs may open their streams again by name, such as `/dev/stdout`. So pipes and terminals belong to the program's
    user before it runs: for other users than root, pipes are created here and not by `subprocess`.
    """

    def __init__(self, wanted: tuple[int, int, int], owner: int | None) -> None:
        import subprocess

        self.theirs = list(wanted)
        self._ours = [-1, -1, -1]
        if not owner:
            return
        for number, fd in enumerate(wanted):
            if fd == subprocess.PIPE:
                read, write = os.pipe()
                self.theirs[number], self._ours[number] = (read, write) if number == 0 else (write, read)
            if self.theirs[number] >= 0:
                os.fchown(self.theirs[number], owner, -1)

    def hand_over(self, process: subprocess.Popen[bytes]) -> None:
        """Gives this side's ends to the process object, like `subprocess` would, and closes the program's."""
        for number, (name, mode) in enumerate((("stdin", "wb"), ("stdout", "rb"), ("stderr", "rb"))):
            if self._ours[number] >= 0:
                os.close(self.theirs[number])
                setattr(process, name, os.fdopen(self._ours[number], mode, buffering=0))

    def abandon(self) -> None:
        """Closes both ends of the pipes that were created here."""
        for ours, theirs in zip(self._ours, self.theirs, strict=True):
            if ours >= 0:
                os.close(ours)
                os.close(theirs)


def make_directory(path: str) -> None:
    """Creates a directory and its parents, as far as possible; a program that needs it will report an error."""
    try:
        os.makedirs(path, 0o755, exist_ok=True)
    except OSError:
        pass


def _spawn_error(error: BaseException, program: str, workdir: str) -> BaseException:
    """Returns the error to raise instead of `error`."""
    import subprocess

    if isinstance(error, SpawnError):
        return error
    if isinstance(error, FileNotFoundError):
        if error.filename == workdir and workdir != program:
            return SpawnError("no_such_directory", f"there is no directory {workdir}")
        return SpawnError("not_found", f"there is no program {program}")
    if isinstance(error, NotADirectoryError):
        return SpawnError("no_such_directory", f"{workdir} is not a directory")
    if isinstance(error, PermissionError):
        return SpawnError("not_executable", f"{program} can't be executed")
    if isinstance(error, OSError | ValueError | subprocess.SubprocessError):
        return SpawnError("spawn_failed", f"{program} does not start: {error}")
    return error


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to the process group of a leader that was not reaped, so that its number is still valid."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGKILL to the process group of a leader that was not reaped."""
    signal_group(process, signal.SIGKILL)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGKILL to all processes of the session of a leader that was not reaped.

    A shell with job control gives each job its own process group. Processes with their own session (daemons) continue.
    """
    kill_group(process)
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            pidfd = os.pidfd_open(int(name))
        except OSError:
            continue
        try:
            # Read once the descriptor is open: so it is about this process, and not a later one with its number.
            with open(f"/proc/{name}/stat", "rb") as handle:
                if int(handle.read(4096).rpartition(b")")[2].split()[3]) == process.pid:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except (OSError, ValueError, IndexError):
            pass
        finally:
            os.close(pidfd)


def has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Returns whether a process has ended, without reaping it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def how_it_ended(returncode: int) -> dict[str, int]:
    """Returns `exit_code` or `signal` for the result of `Popen.wait`."""
    return {"exit_code": returncode} if returncode >= 0 else {"signal": -returncode}
