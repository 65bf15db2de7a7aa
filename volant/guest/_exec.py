"""`POST /v1/exec`: run a command, stream what it writes, say how it ended.

One thread and one poll loop for each command. It reads no more of the command's output than the client takes, so a slow
client holds the command back instead of filling memory. When the client leaves or the time is over, the whole process
group gets SIGKILL, while its leader is still unreaped, so that its number can't belong to anyone else by then.

The end is the end of the command itself. What it left running in the background keeps its pipes open, and is not waited
for: only what is in the pipes by then is still read.
"""

# ruff: noqa: PTH123 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import select
import signal
import time

from . import _root
from ._http import LAST_CHUNK, Gone, Problem, chunk
from ._watch import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any

    from ._http import Request, Stream

_READ = 64 * 1024
_MAX_TIMEOUT_S = 7 * 86400.0
_MAX_ITEMS = 4096
_REAP_S = 5.0
_STALL_S = 600.0
_MAX_PIPE = 1024 * 1024
_MAX_PENDING = 256 * 1024
_FIELDS = {"command", "env", "cwd", "user", "timeout_s", "stdin"}


def base_environment() -> dict[str, str]:
    """Return what each command and workload finds in its environment."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
    }


def decode_json(body: bytes, fields: set[str]) -> dict[str, Any]:
    """Return the object in a body; :raises Problem: 400, it is none, or has other fields than `fields`."""
    import json

    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise Problem(400, "the body is no JSON") from None
    return check_object(value, fields, "the body")


def check_object(value: object, fields: set[str], what: str) -> dict[str, Any]:
    """Return an object with no other fields than `fields`; :raises Problem: 400, it is none."""
    if not isinstance(value, dict):
        raise Problem(400, f"{what} is no JSON object")
    for name in value:
        if name not in fields:
            raise Problem(400, f"unknown field {name[:80]!r}", field=name[:80])
    return value


def check_strings(value: object, field: str, *, empty: bool = False) -> list[str]:
    """Return a list of texts that can be arguments; :raises Problem: 400, it is none."""
    if not isinstance(value, list) or len(value) > _MAX_ITEMS or not (value or empty):
        raise Problem(400, f"{field} is no list of 1 to {_MAX_ITEMS} texts", field=field)
    for item in value:
        if not isinstance(item, str) or "\0" in item:
            raise Problem(400, f"{field} has an item that is no text without NUL", field=field)
    return value


def check_environment(value: object, field: str) -> dict[str, str]:
    """Return variables by name; :raises Problem: 400, they can't be an environment."""
    if not isinstance(value, dict) or len(value) > _MAX_ITEMS:
        raise Problem(400, f"{field} is no object of at most {_MAX_ITEMS} texts", field=field)
    for name, text in value.items():
        if not name or "=" in name or "\0" in name or not isinstance(text, str) or "\0" in text:
            raise Problem(400, f"{field} has a variable that can't be set: {name[:80]!r}", field=field)
    return value


def check_directory(value: object, field: str) -> str:
    """Return an absolute path; :raises Problem: 400, it is none."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise Problem(400, f"{field} is no absolute path", field=field)
    return value


def check_number(value: object, field: str, low: float, high: float) -> float:
    """Return a number between `low` and `high`; :raises Problem: 400, it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Problem(400, f"{field} is no number from {low:g} to {high:g}", field=field)
    return float(value)


def check_size(value: object, field: str) -> int:
    """Return a number of rows or columns; :raises Problem: 400, no terminal has so many."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65536:
        raise Problem(400, f"{field} is no whole number from 1 to 65535", field=field)
    return value


class Command:
    """A checked request to run something. Over HTTP there is no terminal."""

    def __init__(self, value: dict[str, Any]) -> None:
        """:raises Problem: 400, a field is wrong."""
        if "command" not in value:
            raise Problem(400, "command is missing", field="command")
        self.command = check_strings(value["command"], "command")
        if not self.command[0]:
            raise Problem(400, "command has an empty program", field="command")
        self.env = base_environment() | check_environment(value.get("env", {}), "env")
        self.cwd = check_directory(value["cwd"] if value.get("cwd") is not None else "/", "cwd")
        user = value.get("user")
        if user is not None and (not isinstance(user, str) or not user or "\0" in user or len(user) > 256):
            raise Problem(400, "user is no name or number", field="user")
        self.user: str | None = user
        timeout = value.get("timeout_s")
        self.timeout_s = None if timeout is None else check_number(timeout, "timeout_s", 0.001, _MAX_TIMEOUT_S)
        self.stdin = _decode_stdin(value.get("stdin"))
        tty = value.get("tty", False)
        if not isinstance(tty, bool):
            raise Problem(400, "tty is neither true nor false", field="tty")
        self.tty = tty
        self.rows = check_size(value.get("rows", 24), "rows")
        self.cols = check_size(value.get("cols", 80), "cols")
        if tty:
            self.env.setdefault("TERM", "xterm")


def _decode_stdin(value: object) -> bytes:
    import binascii

    if value is None:
        return b""
    try:
        if not isinstance(value, str):
            raise ValueError
        return binascii.a2b_base64(value.encode("ascii"), strict_mode=True)
    except ValueError:
        raise Problem(400, "stdin is no base64", field="stdin") from None


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
    """Start a program as the leader of its own session; :raises SpawnError: it does not start, and why.

    With `terminal`, `stdin` is one, and becomes the session's own.
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
        raise SpawnError("no_such_directory", f"{cwd} is no directory") from None
    except PermissionError:
        raise SpawnError("not_executable", f"{command[0]} can't be executed") from None
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise SpawnError("spawn_failed", f"{command[0]} does not start: {error}") from None
    try:
        # Without memory, the kernel is to end a command rather than the agent, whose mark it has inherited.
        with open(f"/proc/{process.pid}/oom_score_adj", "w") as handle:
            handle.write("0")
    except OSError:
        pass
    return process


def handle(stream: Stream, request: Request) -> None:
    """Answer `POST /v1/exec`; :raises Problem: 400 before anything was started; :raises Gone: the client left."""
    import subprocess

    command = Command(decode_json(stream.read_body(request), _FIELDS))
    started = time.monotonic()
    stream.start(200, [("Content-Type", "application/x-ndjson")], chunked=True)
    try:
        process = spawn(
            command.command,
            command.env,
            command.cwd,
            command.user,
            subprocess.PIPE if command.stdin else subprocess.DEVNULL,
            subprocess.PIPE,
            subprocess.PIPE,
        )
    except SpawnError as error:
        stream.send(chunk(_line({"error": str(error), "code": error.code})) + LAST_CHUNK)
        return
    deadline = None if command.timeout_s is None else started + command.timeout_s
    run = _Run(process, Client(stream.sock), deadline, command.stdin)
    try:
        end: dict[str, Any] | None = run.loop()
    finally:
        run.close()
    if end is None:
        text = f"the command was killed, as it had not ended after {command.timeout_s:g} s"
        end = {"error": text, "code": "timeout"}
    stream.send(chunk(_line(end)) + LAST_CHUNK)


def _line(value: object) -> bytes:
    import json

    return json.dumps(value).encode() + b"\n"


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to all processes of a group whose leader has not been reaped."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a process has ended, without reaping it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def how_it_ended(returncode: int) -> dict[str, int]:
    """Return `exit_code` or `signal` for what `Popen.wait` returned."""
    return {"exit_code": returncode} if returncode >= 0 else {"signal": -returncode}


class _Run:
    """A command under way."""

    def __init__(self, process: subprocess.Popen[bytes], client: Client, deadline: float | None, stdin: bytes) -> None:
        self._process = process
        self._client = client
        self._deadline = deadline
        self._pending = bytearray()
        self._stdin = memoryview(stdin)
        self._pidfd = os.pidfd_open(process.pid)
        self._names: dict[int, bytes] = {}
        for pipe, name in ((process.stdout, b"stdout"), (process.stderr, b"stderr")):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._names[pipe.fileno()] = name
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)

    def loop(self) -> dict[str, int] | None:
        """Stream until the command has ended; return how, or None when its time was over.

        :raises Gone: the client left
        """
        while True:
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                kill_group(self._process)
                self._drain()
                self._flush_within(_REAP_S)
                return None
            found = self._client.wait(
                self._interests(),
                None if self._deadline is None else self._deadline - now,
                writable=bool(self._pending),
            )
            if self._client.sock.fileno() in found:
                self._flush()
            stdin = self._process.stdin
            if stdin is not None and not stdin.closed and stdin.fileno() in found:
                self._feed(found[stdin.fileno()])
            if self._pidfd in found:
                # All that it had written is in the pipes by now.
                self._drain()
                self._flush_within(_STALL_S)
                return how_it_ended(self._process.wait())
            for fd in list(self._names):
                if fd in found:
                    self._read(fd)

    def _interests(self) -> dict[int, int]:
        wanted = {self._pidfd: select.POLLIN}
        if len(self._pending) < _MAX_PENDING:
            wanted.update(dict.fromkeys(self._names, select.POLLIN))
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            wanted[stdin.fileno()] = select.POLLOUT
        return wanted

    def _read(self, fd: int) -> bool:
        """Take what one read of a pipe gives; return whether it gave anything."""
        import binascii

        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return False
        if not data:
            del self._names[fd]
            return False
        text = binascii.b2a_base64(data, newline=False)
        self._pending += chunk(b'{"stream":"%b","data":"%b"}\n' % (self._names[fd], text))
        return True

    def _drain(self) -> None:
        """Take what lies in the pipes, at most what a pipe can hold, although the client may be slow."""
        for fd in list(self._names):
            for _ in range(_MAX_PIPE // _READ):
                if not self._read(fd):
                    break

    def _feed(self, events: int) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            if not events & select.POLLERR:
                self._stdin = self._stdin[os.write(stdin.fileno(), self._stdin[:_READ]) :]
            if self._stdin and not events & select.POLLERR:
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        stdin.close()

    def _flush(self) -> None:
        sent = self._client.send_some(memoryview(self._pending))
        del self._pending[:sent]

    def _flush_within(self, stall_s: float) -> None:
        """Write what is pending; :raises Gone: the client left, or took nothing for `stall_s`."""
        while self._pending:
            if not self._client.wait({}, stall_s, writable=True):
                raise Gone
            self._flush()

    def close(self) -> None:
        """End what still runs of a command that has not come to its own end, and give everything back."""
        process = self._process
        if process.returncode is None:
            if not has_exited(process):
                kill_group(process)
            import subprocess

            try:
                process.wait(_REAP_S)
            except subprocess.TimeoutExpired:
                pass
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        os.close(self._pidfd)
        self._client.sock.setblocking(True)
