"""The client: one object, with methods grouped like the API's paths."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal

import trio

from volant.model import (
    ArtifactView,
    AuditGap,
    AuditRecord,
    ConsoleGap,
    CreateVm,
    Event,
    ImageView,
    LogGap,
    LogLine,
    RestoreVm,
    Status,
    StreamGap,
    VmView,
    check_name,
    format_duration,
)
from volant.model.agent_types import ExecStart, WorkloadStart

from ._actions import ACTION_S, ActionAnswer, Pieces, is_from_guest
from ._address import DEFAULT_BASE, Address
from ._audit import pump_audit
from ._backups import Backup, open_backup
from ._calls import duration, pairs
from ._console import Console, ConsoleState, pump_console
from ._errors import ClientProblem, Command, Reconnected, UnexpectedAnswer, Waited
from ._events import pump_events
from ._exec import Process, request_body
from ._exec_session import ExecSession, attach_session, open_session, open_workload
from ._feed import Feed, OnRetry, Patience, feeding
from ._files import SILENCE_S, TAR, FileInfo, FileReader, file_url, open_file, put_file, stat_file
from ._http import Http, chunks_of
from ._logs import pump_logs
from ._operations import ImagesOperations, PluginsOperations
from ._requests import Requests, SystemRequests, VmsRequests, checked, vm_path
from ._tcp import TcpStream
from ._tls import Tls
from ._transport import ANSWER_S, Query, Request, decode
from ._upload import send_artifact, send_image
from ._websocket import open_websocket

_PATIENCE_S = 60.0
_MAX_WAIT_S = 600.0


class Client(Requests):
    """A connection to one daemon, for one Trio run: `async with Client("http://127.0.0.1:7777") as client`.

    `base_url` may also be `https://…`, `HOST:PORT` or `unix:/PATH`. Every method has a deadline. All raise
    `ClientProblem` if the daemon answers with an error, and another `ClientError` if there is no usable answer.

    :param tls: the certificates to trust and to present, for `https://…`
    :param project: the project of names, for administrators; None for the caller's project, or `default`
    :param host: the host of a fleet that is to answer; None for any host, with the data of all hosts
    :raises ValueError: `base_url` is no address, `project` or `host` no name, or a file of `tls` can't be used.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        project: str | None = None,
        host: str | None = None,
    ) -> None:
        self._http = Http(Address.parse(base_url), api_key, tls, project, host)
        super().__init__(self._http)
        self.vms: _Vms = _Vms(self._http)
        self.plugins: _Plugins = _Plugins(self._http)
        self.images: _Images = _Images(self._http)
        self.system: _System = _System(self._http)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.aclose()

    @asynccontextmanager
    async def events(
        self,
        *,
        after: str | None = None,
        vm: str | None = None,
        types: Collection[str] = (),
        labels: Mapping[str, str] | None = None,
        patience_s: float = _PATIENCE_S,
        on_retry: OnRetry | None = None,
    ) -> AsyncIterator[Feed[Event | StreamGap]]:
        """Follows the events of all VMs, or the matching ones: each at least once and in order, or a `StreamGap`.

        :param after: an event's id; `"0"` for the oldest event; None for only new events
        :param patience_s: how long to try to reconnect
        :param on_retry: called before each attempt to reconnect
        """
        query: dict[str, str | Sequence[str] | None] = {
            "vm": vm,
            "types": ",".join(types) or None,
            "label": pairs(labels),
        }
        last_event_id = ""
        if after == "0":
            query["since"] = "0"
        else:
            # An explicit position, so that a connection that breaks before the first event loses nothing.
            last_event_id = after if after is not None else await self.newest_event()
        backoff = Patience(patience_s, on_retry)
        async with feeding(partial(pump_events, self._http, query, last_event_id, backoff)) as feed:
            yield feed

    @asynccontextmanager
    async def audit(
        self,
        *,
        after: int | None = None,
        tail: int | None = None,
        since: str | None = None,
        until: str | None = None,
        caller: str | None = None,
        operation: str | None = None,
        target: str | None = None,
        request_id: str | None = None,
        project: str | None = None,
        follow: bool = False,
        patience_s: float = _PATIENCE_S,
        on_retry: OnRetry | None = None,
    ) -> AsyncIterator[Feed[AuditRecord | AuditGap]]:
        """Reads the audit log, oldest first: the matching records, or an `AuditGap` for expired ones.

        :param after: begin after the record with this `seq`
        :param tail: begin with this number of the newest records, at most 1000
        :param since: begin at this time (RFC 3339); `until` ends before that time
        :param project: records of this project; None for all projects
        :param follow: continue with new records; otherwise the feed ends with the newest one
        """
        query: dict[str, str | int | None] = {
            "cursor": after,
            "tail": tail,
            "since": since,
            "until": until,
            "caller": caller,
            "operation": operation,
            "target": target,
            "request_id": request_id,
            "project": project,
            "follow": "true" if follow else None,
        }
        backoff = Patience(patience_s, on_retry)
        async with feeding(partial(pump_audit, self._http, query, follow, backoff)) as feed:
            yield feed


class _Vms(VmsRequests):
    """`client.vms`: the operations, and methods that stream or wait."""

    def __init__(self, http: Http) -> None:
        super().__init__(http)
        self._http = http

    async def wait(
        self, name: str, states: Collection[Status | str] = (Status.RUNNING,), *, timeout_s: float = 60.0
    ) -> Waited:
        """Waits until the VM is in one of `states` (which may include `"deleted"`), ends in another state, or the time
        is up."""
        return await self._wait("GET", name, vm_path(name), states, timeout_s)

    async def create_and_wait(
        self,
        request: CreateVm | RestoreVm,
        states: Collection[Status | str] = (Status.RUNNING,),
        *,
        timeout_s: float = 60.0,
        idempotency_key: str | None = None,
    ) -> Waited:
        """`create`, then `wait`."""
        vm = await self.create(request, idempotency_key=idempotency_key)
        return await self.wait(vm.name, states, timeout_s=timeout_s)

    async def apply_and_wait(
        self,
        name: str,
        command: Command,
        states: Collection[Status | str],
        *,
        timeout_s: float = 60.0,
        grace_s: float | None = None,
        idempotency_key: str | None = None,
    ) -> Waited:
        """Applies a command and waits for its outcome, in one request.

        Two requests would not work for `restart`: right after it the VM is still `running`, from before.
        """
        key = idempotency_key
        return await self._wait(
            "POST", name, f"{vm_path(name)}/{command}", states, timeout_s, {"grace": duration(grace_s)}, key
        )

    async def _wait(
        self,
        method: str,
        name: str,
        path: str,
        states: Collection[Status | str],
        timeout_s: float,
        query: Query | None = None,
        key: str | None = None,
    ) -> Waited:
        """Waits, with several requests if necessary, as the daemon waits for at most 10 minutes."""
        wanted = ",".join(str(state) for state in states)
        give_up_at = trio.current_time() + timeout_s
        while True:
            left_s = min(max(give_up_at - trio.current_time(), 0.001), _MAX_WAIT_S)
            waiting = {**(query or {}), "wait": wanted, "timeout": format_duration(round(left_s, 3))}
            try:
                if method == "POST":
                    response = await self._http.once(path, key=key, query=waiting, timeout_s=left_s + ANSWER_S)
                else:
                    response = await self._http.send(Request(method, path, waiting), timeout_s=left_s + ANSWER_S)
            except ClientProblem as problem:
                if problem.status == 404 and "deleted" in states and method == "GET":
                    return Waited("met", None)
                raise
            outcome: Any = response.headers.get("volant-wait")
            if outcome not in ("met", "failed", "timeout"):
                raise UnexpectedAnswer(f"the answer has no valid Volant-Wait: {outcome!r}")
            if outcome != "timeout" or trio.current_time() >= give_up_at:
                return Waited(outcome, decode(response, VmView))
            # A daemon that stops ends waits with `timeout` at once, so pause before the next request.
            await trio.sleep(0.2)
            method, path, query = "GET", vm_path(name), None

    @asynccontextmanager
    async def exec(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Process]:
        """Runs a command in the guest, with an empty standard input; leaving the block kills it.

        :param timeout_s: the time after which the guest kills the command; None for no limit
        """
        body = request_body(list(command), dict(env or {}), cwd, user, timeout_s)
        silence_s = None if timeout_s is None else timeout_s + ANSWER_S
        path = f"{vm_path(name)}/agent/v1/exec"
        async with self._http.stream(Request("POST", path, body=body), read_s=silence_s) as response:
            async with chunks_of(response) as chunks:
                yield Process(chunks, name)

    def exec_session(
        self,
        name: str,
        command: Sequence[str],
        *,
        tty: bool = False,
        rows: int = 24,
        cols: int = 80,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout_s: float | None = None,
        detach: bool = False,
    ) -> AbstractAsyncContextManager[ExecSession]:
        """Runs an interactive command in the guest.

        :param tty: whether it gets a terminal of `rows` and `cols`
        :param detach: whether it continues when the block is left; `attach` connects to it again by its `id`
        """
        body = request_body(list(command), dict(env or {}), cwd, user, timeout_s)
        start: ExecStart = {**body, "tty": tty, "rows": rows, "cols": cols}
        return open_session(self._http, f"{vm_path(name)}/agent/v1/exec", name, start, detach=detach)

    def attach_workload(
        self,
        name: str,
        *,
        tty: bool = False,
        rows: int = 24,
        cols: int = 80,
        env: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[ExecSession]:
        """Starts the program of a VM that was created with `attach`, and attaches to it. The program keeps running
        after the block, and `attach` connects to it again by its `id`.

        :param tty: whether it gets a terminal of `rows` and `cols`
        :param env: variables that override the program's own, such as `TERM`
        :raises ClientProblem: 409, the VM does not run
        """
        start: WorkloadStart = {"env": dict(env or {}), "tty": tty, "rows": rows, "cols": cols}
        return open_workload(self._http, f"{vm_path(name)}/agent/v1/exec", name, start)

    def attach(
        self, name: str, identifier: str, *, position: int | None = None
    ) -> AbstractAsyncContextManager[ExecSession]:
        """Attaches to a detached command; a client that was attached before is disconnected.

        :param position: bytes of output to skip, as in `ExecSession.position`; None to begin with the oldest stored
            output
        """
        return attach_session(self._http, f"{vm_path(name)}/agent/v1/exec", name, identifier, position)

    async def stat_file(self, name: str, path: str) -> FileInfo:
        """Returns the file or directory at an absolute path in the guest."""
        return await stat_file(self._http, file_url(vm_path(name), path))

    def read_file(self, name: str, path: str, *, start: int = 0) -> AbstractAsyncContextManager[FileReader]:
        """Reads a file of the guest, in pieces, from byte `start` on."""
        return open_file(self._http, file_url(vm_path(name), path), path, directory=False, start=start)

    async def write_file(
        self,
        name: str,
        path: str,
        content: bytes | AsyncIterable[bytes],
        *,
        size: int | None = None,
        mode: int | None = None,
        user: str | None = None,
    ) -> bool:
        """Writes a file of the guest, atomically; returns whether it is new.

        :param size: the sum of the pieces in bytes, if it is known
        :param mode: default: the mode of the existing file, otherwise 0644
        :param user: the owner, optionally with `:GROUP`; default: the owner of the existing file, otherwise root
        """
        query = {"mode": None if mode is None else f"{mode:o}", "user": user}
        media = "application/octet-stream"
        return await put_file(self._http, file_url(vm_path(name), path), content, media=media, query=query, size=size)

    def get_tar(self, name: str, path: str) -> AbstractAsyncContextManager[FileReader]:
        """Reads a directory of the guest as an uncompressed tar, in pieces; names are relative to the directory."""
        return open_file(self._http, file_url(vm_path(name), path), path, directory=True)

    async def put_tar(
        self, name: str, path: str, content: bytes | AsyncIterable[bytes], *, user: str | None = None
    ) -> bool:
        """Unpacks an uncompressed tar into a directory of the guest, which is created if needed, atomically; returns
        whether it is new.

        :param user: the owner of all files; default: the owners in the tar, by number
        """
        url = file_url(vm_path(name), path)
        return await put_file(self._http, url, content, media=TAR, query={"user": user})

    async def delete_file(self, name: str, path: str, *, recursive: bool = False) -> None:
        """Deletes a file, a link, or a directory, which must be empty unless `recursive`."""
        query = {"recursive": "true" if recursive else None}
        await self._http.send(Request("DELETE", file_url(vm_path(name), path), query), timeout_s=SILENCE_S)

    def logs(
        self,
        name: str,
        *,
        tail: int | None = None,
        since: int | str | None = None,
        follow: bool = True,
        streams: Collection[Literal["stdout", "stderr", "console"]] = (),
        patience_s: float = _PATIENCE_S,
        on_retry: OnRetry | None = None,
    ) -> AbstractAsyncContextManager[Feed[LogLine | LogGap]]:
        """Reads a VM's log. The feed ends when the VM is deleted, or without `follow` at the newest line.

        :param tail: begin with this number of lines; default 100 without `since`
        :param since: begin after the line with this number, or at this time (RFC 3339)
        """
        query: dict[str, str | int | None] = {
            "tail": tail if since is None else None,
            "since": since,
            "follow": "true" if follow else "false",
            "stream": ",".join(streams) or None,
        }

        async def pump(channel: trio.MemorySendChannel[LogLine | LogGap], started: Callable[[], None]) -> None:
            await pump_logs(self._http, checked(name), query, Patience(patience_s, on_retry), channel, started)

        return feeding(pump)

    @asynccontextmanager
    async def console(
        self,
        name: str,
        *,
        write: bool = False,
        take: bool = False,
        tail: int | None = None,
        patience_s: float = _PATIENCE_S,
        on_retry: OnRetry | None = None,
    ) -> AsyncIterator[Console]:
        """Opens a VM's serial console; it reconnects after restarts of the daemon and ends with the boot.

        :param write: whether to allow input; a problem (409) while another client may type
        :param take: whether to allow input, and disconnect the client that may type
        :param tail: begin with this number of earlier lines; default 25
        """
        query = {"write": "true" if write else None, "take": "true" if take else None, "tail": tail}
        state = ConsoleState()

        async def pump(
            channel: trio.MemorySendChannel[bytes | ConsoleGap | Reconnected], started: Callable[[], None]
        ) -> None:
            await pump_console(
                self._http, checked(name), query, Patience(patience_s, on_retry), state, channel, started
            )

        async with feeding(pump) as feed:
            yield Console(feed, state)

    @asynccontextmanager
    async def tcp(self, name: str, port: int) -> AsyncIterator[TcpStream]:
        """Opens a TCP connection to a port of the guest's loopback. Leaving the block drops the connection.

        The connection is closed cleanly once both ends have ended their direction.
        """
        path = f"/ws/v1/vms/{checked(name)}/tcp/{port}"
        async with open_websocket(self._http, path, {}, pings=False) as socket:
            yield TcpStream(socket)

    @asynccontextmanager
    async def call_action(
        self,
        name: str,
        action: str,
        body: object = None,
        *,
        content: bytes | AsyncIterable[bytes] | None = None,
        content_type: str | None = None,
        query: Mapping[str, str] | None = None,
        plugin: str | None = None,
    ) -> AsyncIterator[ActionAnswer]:
        """Calls an action of the workload. The block is entered when the answer begins.

        An answer of the workload is returned whatever its status. A `ClientProblem` comes from the daemon: there is no
        such VM or action, the VM does not run, the workload can't be reached or exceeds the action's deadline.

        :param body: sent as JSON; or
        :param content: sent unchanged, with its `content_type`
        :param plugin: the VM's plugin; None to look it up first
        """
        if plugin is None:
            plugin = (await self.get(name)).plugin
        headers = {} if content_type is None else {"Content-Type": content_type}
        path = f"{vm_path(name)}/actions/{check_name(plugin, 'plugin')}/{check_name(action, 'action')}"
        raw = content if content is None or isinstance(content, bytes) else Pieces(content)
        request = Request("POST", path, query, body, headers, also=range(600))
        async with self._http.stream(request, read_s=ACTION_S, content=raw) as response:
            if not response.is_success and not is_from_guest(response.headers):
                raise await self._http.problem_of(response)
            async with chunks_of(response) as chunks:
                yield ActionAnswer(response, chunks)


class _Plugins(PluginsOperations):
    """`client.plugins`."""

    def __init__(self, http: Http) -> None:
        super().__init__(http)
        self._http = http

    async def upload(self, sha256: str, content: AsyncIterable[bytes], size: int) -> ArtifactView:
        """Uploads a file for a manifest, of `size` bytes, to the daemon's cache.

        :raises ClientProblem: `artifact-mismatch` if it has another SHA-256, and others
        """
        return await send_artifact(self._http, sha256, content, size)


class _Images(ImagesOperations):
    """`client.images`."""

    def __init__(self, http: Http) -> None:
        super().__init__(http)
        self._http = http

    async def load(self, content: AsyncIterable[bytes], size: int, reference: str) -> ImageView:
        """Uploads an OCI image as an archive of `size` bytes, with the reference `reference`."""
        return await send_image(self._http, content, size, reference)


class _System(SystemRequests):
    """`client.system`."""

    def __init__(self, http: Http) -> None:
        super().__init__(http)
        self._http = http

    def backup(self) -> AbstractAsyncContextManager[Backup]:
        """Makes a backup of the daemon's database, as one file in pieces: VMs, plugins, events; no disks and no
        logs."""
        return open_backup(self._http)
