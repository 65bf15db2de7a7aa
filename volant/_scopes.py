"""A scope of systemd's for a process: a unit without a service, so that stopping another unit does not touch it.

The manager that has started the daemon is asked on its private socket, where it answers whoever has its own user id. So
it works without a message bus and without polkit, early in a boot and in a sandbox, for the system's manager and for a
user's alike. It is the socket that `systemctl` itself uses, and what is asked, `StartTransientUnit`, is public API.
Rejected: the system bus (one more daemon that must be there), `systemd-run` (it starts processes, and can't take one
that runs), writing to cgroups ourselves (systemd forbids it where it has not delegated, and kills what it does not know
of). Rejected as well: to have each VM started by systemd. A VM must also start where there is none, and two ways to
start one are one too many.

One connection for each process that is moved: it happens once in a VM's life and takes a few milliseconds, and so there
is no connection to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from ._cgroups import Bounds

_TIMEOUT_S = 15.0
_MAX_MESSAGES = 10_000
"""A manager that is busy tells of many jobs; more than that is no answer."""


class ScopeError(Exception):
    """systemd did not make the scope. The text is for people."""


@dataclass(frozen=True)
class Scopes:
    """Where scopes come from, and how they are."""

    socket: Path
    """The manager's private socket."""
    slice: str
    before: tuple[str, ...] = ()
    """Units that are stopped before these scopes are when the host goes down."""
    stop_timeout_s: float = 10.0
    """How long systemd waits after SIGTERM before it kills what is in one."""

    async def enclose(self, pid: int, name: str, description: str, bounds: Bounds | None) -> None:
        """Move a process into a scope of its own, `<name>.scope`, which is held to `bounds` as far as the kernel can;
        it is there when this returns. One that is there already stays.

        :raises ScopeError: systemd refuses, or does not do it within 15 s.
        """
        unit = f"{name}.scope"
        if unit in _units_of(pid):
            return
        try:
            with trio.fail_after(_TIMEOUT_S):
                stream = await trio.open_unix_socket(self.socket)
                async with stream:
                    await self._start(stream, unit, pid, description, bounds)
        except trio.TooSlowError:
            raise ScopeError(f"systemd did not make {unit} within {_TIMEOUT_S:g} s") from None
        except (OSError, ValueError, trio.BrokenResourceError, trio.EndOfChannel) as error:
            raise ScopeError(f"systemd can't be asked for {unit} at {self.socket}: {error}") from error
        if (units := _units_of(pid)) and unit not in units:
            raise ScopeError(f"systemd has made {unit}, and process {pid} is not in it")

    async def _start(
        self, stream: trio.SocketStream, unit: str, pid: int, description: str, bounds: Bounds | None
    ) -> None:
        # Imported here, as most daemons on most machines have no use for it.
        from jeepney import DBusAddress, MessageType, new_method_call
        from jeepney.auth import BEGIN, Authenticator
        from jeepney.io.trio import DBusConnection

        authenticator = Authenticator(inc_null_byte=False)
        await stream.send_all(b"\0")
        for line in authenticator:
            await stream.send_all(line)
            authenticator.feed(await stream.receive_some(4096))
        await stream.send_all(BEGIN)

        connection = DBusConnection(stream.socket)
        name = "org.freedesktop.systemd1"
        manager = DBusAddress("/org/freedesktop/systemd1", bus_name=name, interface=f"{name}.Manager")
        properties = [(key, value) for key, value in self._properties(pid, description, bounds).items()]
        call = new_method_call(manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", (unit, "fail", properties, []))
        await connection.send(call, serial=1)
        job: str | None = None
        ended: dict[str, str] = {}
        for _ in range(_MAX_MESSAGES):
            if job is not None and job in ended:
                if ended[job] != "done":
                    raise ScopeError(f"systemd did not start {unit}: {ended[job]}")
                return
            message = await connection.receive()
            kind, fields = message.header.message_type, _fields(message)
            if kind is MessageType.signal and fields.get("member") == "JobRemoved":
                # It may come before the answer to the call that made the job.
                _, path, _, result = message.body
                ended[path] = result
            elif fields.get("reply_serial") == 1:
                if kind is MessageType.error:
                    raise ScopeError(f"systemd refuses {unit}: {_text(message.body)}")
                (job,) = message.body
        raise ScopeError(f"systemd did not say what became of {unit}")

    def _properties(self, pid: int, description: str, bounds: Bounds | None) -> dict[str, tuple[str, Any]]:
        bounded: dict[str, tuple[str, Any]] = {}
        if bounds is not None:
            bounded = {
                "MemoryMax": ("t", bounds.memory_mb * 2**20),
                "CPUQuotaPerSecUSec": ("t", bounds.cpus * 1_000_000),
                "CPUWeight": ("t", bounds.weight),
                "IOWeight": ("t", bounds.weight),
                "TasksMax": ("t", bounds.tasks),
            }
        return bounded | {
            "Description": ("s", description),
            "Slice": ("s", self.slice),
            "PIDs": ("au", [pid]),
            "Before": ("as", list(self.before)),
            # Nobody looks at it once its process has ended, however that ended.
            "CollectMode": ("s", "inactive-or-failed"),
            "KillMode": ("s", "control-group"),
            "TimeoutStopUSec": ("t", int(self.stop_timeout_s * 1e6)),
        }


def _fields(message: Any) -> Mapping[str, Any]:
    return {field.name: value for field, value in message.header.fields.items()}


def _text(body: tuple[object, ...]) -> str:
    return str(body[0])[:500] if body else "without a word"


def _units_of(pid: int) -> set[str]:
    """The units whose control groups a process is in, as its innermost groups are named; empty when it has ended. A
    host with both versions of control groups has one line for each hierarchy, and systemd uses but one or two."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return set()
    return {line.rpartition("/")[2] for line in lines}
