"""Requests a scope from systemd: a unit without a service, so that stopping another unit does not affect its processes.

The daemon asks its own manager on the manager's private socket, which answers processes of its user. So this works
without a message bus and polkit, early in a boot and in a sandbox, for the system's manager and for a user's alike.
`systemctl` uses the same socket, and the call, `StartTransientUnit`, is public API. Rejected: the system bus (one more
daemon that must run), `systemd-run` (it starts processes, and can't take a running one), writing to cgroups (systemd
forbids it without delegation, and kills processes that it does not know), and VMs that systemd starts: a VM must also
start without systemd, and one way to start it is enough.

Each call opens a separate connection, as a VM needs one call of a few milliseconds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from ._cgroups import ResourceLimits

if TYPE_CHECKING:
    from jeepney.io.trio import DBusConnection

_SYSTEMD, _MANAGER = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
_UNLIMITED = 2**64 - 1
_TIMEOUT_S = 15.0
_MAX_MESSAGES = 10_000
"""Maximum messages that are read: a busy manager reports many jobs."""


class ScopeError(Exception):
    """systemd did not create the scope."""


class Scopes(msgspec.Struct, frozen=True):
    """Creates scopes."""

    socket: Path
    """The manager's private socket."""
    slice: str
    before: tuple[str, ...] = ()
    """Units that systemd stops before these scopes when the host shuts down."""
    stop_timeout_s: float = 10.0
    """The time between SIGTERM and SIGKILL when systemd stops a scope."""

    async def enclose(
        self, pid: int, name: str, description: str, limits: ResourceLimits | None, *, delegate: bool = False
    ) -> None:
        """Moves a process into a separate scope, `<name>.scope`, with `limits` as far as the kernel supports them. An
        existing scope is kept. With `delegate` the daemon can create groups below the scope's.

        :raises ScopeError: systemd refuses, or does not do it within 15 s.
        """
        unit = f"{name}.scope"
        if unit in _units_of(pid):
            return
        async with self._connected(unit) as connection:
            properties = self._properties(pid, description, limits)
            if delegate:
                # The groups in it have limits of their own.
                properties |= {"Delegate": ("b", True), "TasksMax": ("t", _UNLIMITED)}
            await self._start(connection, unit, properties)
        if (units := _units_of(pid)) and unit not in units:
            raise ScopeError(f"systemd has made {unit}, and process {pid} is not in it")

    async def group_of(self, name: str) -> str:
        """Returns the path of the control group of the scope `<name>.scope`, from systemd's root group; empty if there
        is no such scope.

        :raises ScopeError: systemd refuses, or does not answer within 15 s.
        """
        unit = f"{name}.scope"
        # systemd escapes what may not stand in the path of an object.
        escaped = "".join(each if each.isascii() and each.isalnum() else f"_{ord(each):02x}" for each in unit)
        path, interface = f"/org/freedesktop/systemd1/unit/{escaped}", "org.freedesktop.DBus.Properties"
        arguments = ("org.freedesktop.systemd1.Scope", "ControlGroup")
        ((_, group),) = await self._ask(unit, path, interface, "Get", "ss", arguments)
        return str(group)

    async def weigh(self, name: str, weight: int) -> None:
        """Sets the share of the scope `<name>.scope` in a busy processor or disk.

        :raises ScopeError: systemd refuses, or does not answer within 15 s.
        """
        unit = f"{name}.scope"
        properties = [("CPUWeight", ("t", weight)), ("IOWeight", ("t", weight))]
        await self._ask(unit, _MANAGER, f"{_SYSTEMD}.Manager", "SetUnitProperties", "sba(sv)", (unit, True, properties))

    async def _ask(
        self, unit: str, path: str, interface: str, method: str, signature: str, arguments: tuple[object, ...]
    ) -> tuple[Any, ...]:
        """Calls a method and returns the answer. :raises ScopeError:"""
        from jeepney import DBusAddress, MessageType, new_method_call

        call = new_method_call(DBusAddress(path, _SYSTEMD, interface), method, signature, arguments)
        async with self._connected(unit) as connection:
            await connection.send(call, serial=1)
            for _ in range(_MAX_MESSAGES):
                message = await connection.receive()
                if _fields(message).get("reply_serial") == 1:
                    if message.header.message_type is MessageType.error:
                        raise ScopeError(f"systemd refuses {method} of {unit}: {_text(message.body)}")
                    body: tuple[Any, ...] = message.body
                    return body
        raise ScopeError(f"systemd did not answer {method} of {unit}")

    @asynccontextmanager
    async def _connected(self, unit: str) -> AsyncIterator[DBusConnection]:
        """Connects to the manager, with a deadline and converted errors. :raises ScopeError:"""
        # Imported here, as most daemons don't need it.
        from jeepney.auth import BEGIN, Authenticator
        from jeepney.io.trio import DBusConnection

        try:
            with trio.fail_after(_TIMEOUT_S):
                stream = await trio.open_unix_socket(self.socket)
                async with stream:
                    authenticator = Authenticator(inc_null_byte=False)
                    await stream.send_all(b"\0")
                    for line in authenticator:
                        await stream.send_all(line)
                        authenticator.feed(await stream.receive_some(4096))
                    await stream.send_all(BEGIN)
                    yield DBusConnection(stream.socket)
        except trio.TooSlowError:
            raise ScopeError(f"systemd did not answer about {unit} within {_TIMEOUT_S:g} s") from None
        except (OSError, ValueError, trio.BrokenResourceError, trio.EndOfChannel) as error:
            raise ScopeError(f"systemd can't be asked for {unit} at {self.socket}: {error}") from error

    async def _start(self, connection: DBusConnection, unit: str, properties: Mapping[str, tuple[str, Any]]) -> None:
        from jeepney import DBusAddress, MessageType, new_method_call

        manager = DBusAddress(_MANAGER, bus_name=_SYSTEMD, interface=f"{_SYSTEMD}.Manager")
        given = list(properties.items())
        call = new_method_call(manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", (unit, "fail", given, []))
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
                # It may come before the reply to the call that made the job.
                _, path, _, result = message.body
                ended[path] = result
            elif fields.get("reply_serial") == 1:
                if kind is MessageType.error:
                    raise ScopeError(f"systemd refuses {unit}: {_text(message.body)}")
                (job,) = message.body
        raise ScopeError(f"systemd did not say what became of {unit}")

    def _properties(self, pid: int, description: str, limits: ResourceLimits | None) -> dict[str, tuple[str, Any]]:
        bounded: dict[str, tuple[str, Any]] = {}
        if limits is not None:
            bounded = {
                "MemoryMax": ("t", limits.memory_mb * 2**20),
                "CPUQuotaPerSecUSec": ("t", limits.cpus * 1_000_000),
                "CPUWeight": ("t", limits.weight),
                "IOWeight": ("t", limits.weight),
                "TasksMax": ("t", limits.tasks),
            }
        return bounded | {
            "Description": ("s", description),
            "Slice": ("s", self.slice),
            "PIDs": ("au", [pid]),
            "Before": ("as", list(self.before)),
            # No one inspects the scope of a process that has ended.
            "CollectMode": ("s", "inactive-or-failed"),
            "KillMode": ("s", "control-group"),
            "TimeoutStopUSec": ("t", int(self.stop_timeout_s * 1e6)),
        }


def _fields(message: Any) -> Mapping[str, Any]:
    return {field.name: value for field, value in message.header.fields.items()}


def _text(body: tuple[object, ...]) -> str:
    return str(body[0])[:500] if body else "without a word"


def _units_of(pid: int) -> set[str]:
    """Returns the units of a process: the names of its innermost control groups; none if it has ended. A host with both
    versions of control groups has one line for each hierarchy, and systemd uses only one or two of them."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return set()
    return {line.rpartition("/")[2] for line in lines}
