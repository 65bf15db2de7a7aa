"""Starting and killing programs in the root filesystem."""

# ruff: noqa: PTH123, PTH208 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import signal

from . import _root

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any


def base_environment() -> dict[str, str]:
    """Returns the environment that every command and workload starts with."""
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


def spawn(
    command: list[str],
    env: dict[str, str],
    cwd: str,
    user: str | None,
    stdin: int,
    stdout: int,
    stderr: int,
    *,
    terminal: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts a program as the leader of a session of its own.

    :param terminal: `stdin` is a terminal, and becomes the controlling terminal of the session
    :raises SpawnError: the program does not start
    """
    import subprocess

    options: dict[str, Any] = {}
    if user is not None:
        try:
            options = dict(_root.identity(user))
        except _root.NoSuchUser:
            raise SpawnError("no_such_user", f"there is no user {user}") from None
    if terminal:
        from ._tty import become_controlling

        options["preexec_fn"] = become_controlling
        if user is not None:
            # Programs open their terminal again, by its name.
            os.fchown(stdin, options["user"], -1)
    try:
        process = _root.inside(
            lambda: subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                bufsize=0,
                start_new_session=True,
                **options,
            )
        )
    except FileNotFoundError as error:
        if error.filename == cwd and cwd != command[0]:
            raise SpawnError("no_such_directory", f"there is no directory {cwd}") from None
        raise SpawnError("not_found", f"there is no program {command[0]}") from None
    except NotADirectoryError:
        raise SpawnError("no_such_directory", f"{cwd} is not a directory") from None
    except PermissionError:
        raise SpawnError("not_executable", f"{command[0]} can't be executed") from None
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise SpawnError("spawn_failed", f"{command[0]} does not start: {error}") from None
    try:
        # It has inherited the agent's score. Without memory, the kernel should kill it before the agent.
        with open(f"/proc/{process.pid}/oom_score_adj", "w") as handle:
            handle.write("0")
    except OSError:
        pass
    return process


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to the process group of a leader that was not reaped, so its number is still its own."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGKILL to the process group of a leader that was not reaped."""
    signal_group(process, signal.SIGKILL)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGKILL to all processes of the session of a leader that was not reaped.

    A shell with job control gives each job a process group of its own. Processes that began a session of their own
    (daemons) go on.
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
