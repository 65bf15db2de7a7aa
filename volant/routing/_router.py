"""Finds the host that must answer a request, and passes it on.

- A request about a VM, a snapshot or a volume goes to its host. For a VM on an unreachable host the last known state is
  shown.
- A create goes to the host with the snapshot and the volumes in the request, otherwise to the choice of placement, or
  to the next host if that one has no room.
- The header `Volant-Host` names a host, for requests about hosts themselves.
- A model's message goes to the host of the operation that it calls.
- Everything else is answered here.

The object of a request follows from the path of its operation: the first name in it, and the word before that name.

A request that another host has passed on is always answered here, so no request can circulate.
"""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import msgspec

from volant.fleet import CALLER, HOST, Fleet, Wanted, place, request_headers
from volant.http import Access, Call, Limits, Message, first_problem, read_call_bytes, without_credentials
from volant.model import Placement, Problem, is_name
from volant.operations import Operation
from volant.relay import Relay, end_to_end

_GET = "get_vm"
Header = tuple[bytes, bytes]
_TRIES = 3
_CREDENTIALS = frozenset(
    {b"authorization", b"x-volant-api-key", b"volant-session", b"cookie", b"volant-project", b"x-forwarded-for"}
)
_NO_ROOM = ("no-capacity", "draining", "daemon-stopping")


class _Create(msgspec.Struct, frozen=True):
    """The part of a create's body that routing needs. The receiving host checks all of it."""

    name: str = ""
    memory_mb: int | None = None
    disk_mb: int | None = None
    size_mb: int | None = None
    from_snapshot: str | None = None
    volumes: Sequence[str] = ()
    placement: Placement | None = None


SubjectOf = Callable[[bytes], tuple[Operation, Mapping[str, Any]] | None]
"""Returns the operation that a body calls, and the arguments; None if it calls none."""


class Router:
    """Passes requests on to other hosts."""

    def __init__(
        self, fleet: Fleet, access: Access, relay: Relay, limits: Limits, messages: Mapping[str, SubjectOf]
    ) -> None:
        """Creates it. `messages` has, for operations whose bodies call others, functions that return these, by
        operation name."""
        self._fleet = fleet
        self._access = access
        self._relay = relay
        self._limits = limits
        self._messages = messages

    @property
    def header(self) -> Header:
        """Returns the header with the host that has answered."""
        return HOST, self._fleet.host.encode("ascii")

    async def route(self, call: Call, operation: Operation | None, path: str) -> bool:
        """Answers a request through another host, if that is responsible; returns whether it was.

        :raises Problem: 404, there is no such host; 503, it does not answer.
        """
        if operation is None or self._fleet.left:
            return False
        kind, name = _subject(operation, path)
        if operation.vm_in_query and (vm := parse_qs(call.scope["query_string"].decode("latin-1")).get("vm")):
            kind, name = "vms", vm[0]
        if call.scope["state"].get("forwarded") is not None:
            if kind in self._fleet.names and name is not None:
                await self._check_here(call, kind, name)
            return False
        named = call.header(HOST)
        if named is not None:
            return await self._to_named(call, named)
        if operation.name in self._messages:
            return await self._message(call, self._messages[operation.name])
        if kind not in self._fleet.names:
            return False
        if name is None:
            return operation.method == "POST" and await self._create(call, kind)
        owner = await self._find(call, kind, name)
        if owner in (None, self._fleet.host):
            return False
        if operation.name == _GET and not self._fleet.is_up(owner) and await self._show_last_known(call, name):
            return True
        return await self._to_named(call, owner)

    async def _to_named(self, call: Call, host: str) -> bool:
        if host == self._fleet.host:
            return False
        await self._pass_on(call, host)
        return True

    def _owner(self, call: Call, kind: str, name: str | None) -> str | None:
        """Returns the host that has an object of the project; None if no host is known to have it."""
        return self._fleet.names[kind].owner(call.named(name)) if name is not None and is_name(name) else None

    async def _find(self, call: Call, kind: str, name: str) -> str | None:
        """Returns the host like `_owner`, and None only if there certainly is none. :raises Problem: 503, it is unknown
        now."""
        return await self._fleet.names[kind].find(call.named(name)) if is_name(name) else None

    async def _check_here(self, call: Call, kind: str, name: str) -> None:
        """Checks that no other host has the object that another host has requested from this one, whose knowledge may
        be old.

        :raises Problem: 503, another host has it
        """
        owner = await self._find(call, kind, name)
        if owner not in (None, self._fleet.host):
            raise Problem(
                503, "on-another-host", f"the host {owner!r} has {name!r} now, and not {self._fleet.host!r}",
                hint="try again", retry_after_s=1,
            )  # fmt: skip

    async def _show_last_known(self, call: Call, name: str) -> bool:
        """Answers with the last known state of a VM on an unreachable host; returns whether there is one."""
        shown = self._fleet.last_known(call.named(name))
        if shown is None:
            return False
        body = msgspec.json.encode(shown)
        length = (b"content-length", b"%d" % len(body))
        await call.reject(200, [(b"content-type", b"application/json"), length], body)
        return True

    async def _message(self, call: Call, subject_of: SubjectOf) -> bool:
        """Passes on a message. Failures are answered here, in the form of the protocol."""
        body = await read_call_bytes(call, self._limits)
        call.receive = _Replay(call, body)
        found = subject_of(body)
        if found is None:
            return False
        try:
            host = await self._host_of(call, *found)
            if host in (None, self._fleet.host):
                return False
            await self._pass_on(call, host)
            return True
        except* Problem as group:
            call.scope["state"]["elsewhere"] = first_problem(group)
        call.receive = _Replay(call, body)
        return False

    async def _host_of(self, call: Call, operation: Operation, arguments: Mapping[str, Any]) -> str | None:
        """Returns the host for a call of an operation; None for any. :raises Problem: 409, 503"""
        kind, name = _subject(operation, operation.path)
        if kind not in self._fleet.names:
            return None
        if name is not None:
            given = arguments.get(kind.removesuffix("s"), arguments.get("name"))
            return await self._find(call, kind, given) if isinstance(given, str) else None
        if operation.method != "POST":
            return None
        try:
            wanted = msgspec.convert(arguments, _Create)
        except msgspec.ValidationError:
            return None
        return self._hosts_for(call, kind, wanted)[0] if is_name(wanted.name) else None

    async def _create(self, call: Call, kind: str) -> bool:
        body = await read_call_bytes(call, self._limits)
        call.receive = _Replay(call, body)
        try:
            wanted = msgspec.json.decode(body, type=_Create)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
            return False  # The answer here says what is wrong with it.
        if not is_name(wanted.name):
            return False
        hosts = self._hosts_for(call, kind, wanted)
        for number, host in enumerate(hosts, 1):
            if host == self._fleet.host:
                return False
            call.receive = _Replay(call, body)
            has_room = True
            try:
                await self._pass_on(call, host, last=number == len(hosts))
            except* _NoRoom:
                has_room = False
            if has_room:
                return True
        return False

    def _hosts_for(self, call: Call, kind: str, wanted: _Create) -> list[str]:
        """Returns the hosts that may create an object, best first.

        :raises Problem: 409, the required objects are on several hosts; 503, no host can run it.
        """
        # A create that is repeated goes to the host that has what was made, which knows the answer.
        owner = self._owner(call, kind, wanted.name)
        if owner is not None:
            return [owner]
        # A directory is one of the host that was asked.
        here = any(mount.startswith("/") for mount in wanted.volumes)
        needed = {} if not here else {"the directory": self._fleet.host}
        used = [("volumes", mount.partition(":")[0]) for mount in wanted.volumes] + [
            ("snapshots", wanted.from_snapshot)
        ]
        for what, name in used:
            owner = self._owner(call, what, name)
            if owner is not None:
                needed[f"{what} {name}"] = owner
        hosts = sorted(set(needed.values()))
        if len(hosts) > 1:
            there = ", ".join(f"{name} on {host}" for name, host in needed.items())
            raise Problem(
                409, "on-several-hosts", f"what VM {wanted.name!r} needs is not all on one host: {there}",
                hint="use volumes of one host",
            )  # fmt: skip
        if hosts and wanted.placement is None:
            return hosts
        disk_mb = wanted.disk_mb if kind == "vms" else wanted.size_mb
        need = Wanted(
            memory_mb=wanted.memory_mb or 0,
            disk_mb=disk_mb or 0,
            architecture=platform.machine(),
            placement=wanted.placement or Placement(),
        )
        labels_on = partial(self._fleet.labels_on, project=call.project)
        candidates = [each for each in self._fleet.hosts() if not hosts or each.name in hosts]
        return place(candidates, need, here=self._fleet.host, labels_on=labels_on)[:_TRIES]

    async def _pass_on(self, call: Call, host: str, *, last: bool = True) -> None:
        """Passes on a request. With `last` False, an answer that the host has no room raises `_NoRoom`."""
        # The host that does it records it.
        call.cause = None
        server = _Host(call, host, self._access.own_address(call.scope))
        async with self._fleet.peers.connect(host) as client:
            explain = None if last else _explain
            share = zlib.crc32(host.encode())
            await self._relay.run(call, client, server, share=share, explain=explain, explained=(503,))


class _NoRoom(Problem):
    """The host has no room."""


def _explain(status: int, body: bytes) -> Problem | None:
    try:
        problem = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
        return None
    code = str(problem.get("type", "")).rpartition(":")[2]
    return _NoRoom(status, code, str(problem.get("detail", ""))) if code in _NO_ROOM else None


class _Host:
    """Another host, as the server of one request."""

    def __init__(self, call: Call, host: str, address: tuple[bool, str]) -> None:
        """Creates it. `address` is this host's address for the client."""
        self._call = call
        self._address = address
        self.name = f"host {host}"
        self._host = host
        path = call.scope["raw_path"].decode("ascii")
        query = without_credentials(call.scope["query_string"]).decode("ascii")
        self.target = f"{path}?{query}" if query else path

    def request_headers(self, headers: Iterable[Header]) -> list[Header]:
        kept = [
            field
            for field in end_to_end(headers)
            if field[0] not in _CREDENTIALS and field[0] not in (b"host", b"expect", b"x-request-id", CALLER, HOST)
        ]
        return [*kept, *request_headers(self._call.scope, self._address)]

    def answer_headers(self, headers: Iterable[Header]) -> list[Header]:
        return end_to_end(headers)

    def upgrade_headers(self, headers: Iterable[Header]) -> list[Header]:
        return end_to_end(headers)

    def closing(self) -> tuple[int, str] | None:
        return None

    def unreachable(self, why: str) -> Problem:
        return Problem(
            503, "host-unreachable", f"the host {self._host!r} does not answer: {why}",
            hint="its VMs may still run; try again", retry_after_s=2,
        )  # fmt: skip


class _Replay:
    """Returns the body of a request that was read already, and then further messages."""

    def __init__(self, call: Call, body: bytes) -> None:
        self._after = call.receive.after if isinstance(call.receive, _Replay) else call.receive
        self._body: bytes | None = body

    @property
    def after(self) -> Any:
        """Receives messages after the body."""
        return self._after

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            message: Message = await self._after()
            return message
        return {"type": "http.request", "body": body, "more_body": False}


def _subject(operation: Operation, path: str) -> tuple[str, str | None]:
    """Returns the object of a request: its word in the path, and its name; None if there is no name."""
    parts = operation.path.split("/")
    for number, (part, given) in enumerate(zip(parts, path.split("/"), strict=False)):
        if part.startswith("{"):
            return parts[number - 1], given
    return parts[-1], None
