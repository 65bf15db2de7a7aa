"""A server on a free loopback port, and clients that speak bytes, as no well-behaved library would."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import h11
import httpx
import trio
from trio_websocket import WebSocketConnection, open_websocket_url

from actors import ONE_FOR_ONE, AskTimeout, Child, DynamicSupervisor, Request, Supervisor, open_system
from tests.api import conformance
from tests.channel.kit import Hypervisor, Way
from volant.api import create_app
from volant.channel import AgentClient, open_channel
from volant.daemon._image_events import ImageEvents
from volant.directories import AllowedDirectory, Virtiofsd
from volant.egress import EgressActivity, HostDns, VmResolvers
from volant.fleet import Fleet
from volant.guest._server import Server
from volant.host import Host
from volant.http import Access, ApiSettings, Limits, serve
from volant.hypervisor.qemu import QemuHypervisor
from volant.identity import NamedKeys
from volant.images import PUBLIC, ArtifactCache, Origins
from volant.journal import Backups, Journal, Recorder, Retention, Store
from volant.logs import VmLogs
from volant.model import DEFAULT_SUBNET, Key
from volant.network import HostNetwork, Networks, NetworkSettings, Passt
from volant.oci import ImageLibrary, ImageService, ImageSettings
from volant.operations import TABLE, ApiDeps, Health, Table
from volant.secrets import KeyFile, Secrets
from volant.templates import TemplateBuilder, Templates, TemplateStore, WarmPool, WarmPoolLimits
from volant.transfer import BaseFiles, Transfers, TransferSettings, registries
from volant.vm import BootSlots, GuestAccess, Vms, VmSettings, bounds_of, image_users

FAST = Limits(
    keep_alive_s=30.0, header_s=5.0, send_s=20.0, finish_s=3.0, drop_s=2.0, linger_s=0.5, grace_s=0.3, lifespan_s=2.0
)

UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec_WebSocket_Version": "13",
}


@dataclass
class Running:
    """A server under test."""

    port: int
    stopping: trio.Event
    stopped: trio.Event

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def stop(self) -> None:
        """Order the stop, and wait for it."""
        self.stopping.set()
        with trio.fail_after(30.0):
            await self.stopped.wait()

    async def ask(self, request: bytes) -> Answer:
        """Send bytes on a connection of their own, read one answer."""
        async with await self.connect() as stream:
            await stream.send_all(request)
            return await read_answer(stream)

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.ask(request("GET", path, **headers))


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    all_headers: list[tuple[str, str]]


def request(method: str, path: str, body: bytes | None = None, /, **headers: str) -> bytes:
    fields = {"Host": "127.0.0.1", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body is not None:
        fields.setdefault("Content-Length", str(len(body)))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + (body or b"")


async def read_answer(stream: trio.abc.ReceiveStream, method: str = "GET", within_s: float = 10.0) -> Answer:
    """One answer; leaves the stream open. Interim answers are skipped."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    parser.send(h11.EndOfMessage())
    body = b""
    head: h11.Response | None = None
    with trio.fail_after(within_s):
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                parser.receive_data(bytes(await stream.receive_some(65536)))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                break
    assert head is not None
    fields = [(name.decode(), value.decode()) for name, value in head.headers]
    return Answer(head.status_code, dict(fields), body, fields)


async def read_head(stream: trio.abc.ReceiveStream) -> tuple[bytes, bytes]:
    """The head of an answer, and what came after it."""
    data = b""
    with trio.fail_after(10):
        while b"\r\n\r\n" not in data:
            chunk = await stream.receive_some(65536)
            assert chunk, data
            data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


async def read_to_end(stream: trio.abc.ReceiveStream, within_s: float = 10.0) -> bytes:
    data = b""
    with trio.fail_after(within_s):
        while chunk := await stream.receive_some(65536):
            data += chunk
    return data


@asynccontextmanager
async def running(
    app: Callable[..., Any], limits: Limits = FAST, sockets: Sequence[socket.socket] = ()
) -> AsyncIterator[Running]:
    """Serve `app`, on these sockets too. Fails when the server ended by itself, or does not stop."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        server = Running(listener.getsockname()[1], trio.Event(), trio.Event())

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await serve(app, [listener, *sockets], stopping=server.stopping, limits=limits, task_status=task_status)
            server.stopped.set()

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            yield server
            assert server.stopping.is_set() or not server.stopped.is_set(), "the server ended by itself"
            server.stopping.set()
            with trio.fail_after(20):
                await server.stopped.wait()


class Body:
    """The body of an answer, as it comes in."""

    def __init__(self, stream: trio.SocketStream, parser: h11.Connection, head: h11.Response) -> None:
        self.status = head.status_code
        self.headers = {name.decode(): value.decode() for name, value in head.headers}
        self._stream = stream
        self._parser = parser

    async def more(self) -> bytes:
        """The next piece; empty at the proper end."""
        with trio.fail_after(10):
            while True:
                event = self._parser.next_event()
                if event is h11.NEED_DATA:
                    self._parser.receive_data(await self._stream.receive_some(65536))
                elif isinstance(event, h11.Data):
                    return bytes(event.data)
                else:
                    assert isinstance(event, h11.EndOfMessage), event
                    return b""


@asynccontextmanager
async def streamed(server: Running, path: str, **headers: str) -> AsyncIterator[Body]:
    """A GET whose answer is read piece by piece."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    parser.send(h11.EndOfMessage())
    async with await server.connect() as stream:
        await stream.send_all(request("GET", path, **headers))
        with trio.fail_after(10):
            while not isinstance(event := parser.next_event(), h11.Response):
                parser.receive_data(await stream.receive_some(65536))
        yield Body(stream, parser, event)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds that gives no notice when it does."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


def bare(handler: Callable[..., Any]) -> Callable[..., Any]:
    """An ASGI app without a framework, whose every request `handler` serves."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await handler(scope, receive, send)
            return
        for step in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{step}.complete"})

    return app


class StandingSystem:
    """The daemon's word about itself, without a daemon."""

    def __init__(self, host: Host) -> None:
        self.started_at = host.clock.now()
        self.adoption_s: float | None = 0.5
        self.now: Health = "ok"

    def health(self) -> Health:
        return self.now

    def tree(self) -> dict[str, object]:
        return {"name": "volantd", "children": []}

    def info(self) -> dict[str, object]:
        return {"addresses": []}


class Unanswered:
    """A journal whose answers to some messages are lost: it has made the change."""

    def __init__(self, journal: Any, lost: type[Request[Any]]) -> None:
        self._journal = journal
        self._lost = lost

    async def ask(self, message: Request[Any], /, *, timeout_s: float) -> Any:
        reply = await self._journal.ask(message, timeout_s=timeout_s)
        if isinstance(message, self._lost):
            raise AskTimeout("journal", type(message).__name__, timeout_s, True)
        return reply


@dataclass
class Api:
    """The whole API on a server, over a real journal, real logs and real actors; VMs that start end in `crashed`."""

    server: Running
    deps: ApiDeps
    client: httpx.AsyncClient
    system: StandingSystem
    access: Access

    def reach(self, agent: AgentClient | Callable[[str], AgentClient]) -> None:
        """From now on this is the way to the agent of each VM, or whatever `agent` does when it is asked for one."""

        class Reaching(GuestAccess):
            def agent(self, vm: Key) -> AgentClient:
                return agent(vm.name) if callable(agent) else agent

        self.replace_guest_access(Reaching)

    def replace_guest_access(self, kind: type[GuestAccess]) -> None:
        """Lets a subclass take the place of `GuestAccess`, whose instances take no other methods."""
        guests = self.deps.vms.guests
        self.deps.vms.guests = kind(guests.host, guests.projection, guests.processes, guests.actors)

    @asynccontextmanager
    async def reaching(self, way: Way) -> AsyncIterator[AgentClient]:
        """The agent of each VM is the one that this leads to; at the end of the block the daemon stops."""
        async with open_channel(way.host, way.address) as channel:
            client = AgentClient(channel)
            self.reach(client)
            yield client
            self.server.stopping.set()
            await self.server.stopped.wait()

    async def create(self, name: str, **fields: Any) -> dict[str, Any]:
        answer = await self.client.post("/api/v1/vms", json={"name": name, "cpu_cores": 1, "memory_mb": 128, **fields})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def crashed(self, name: str, **fields: Any) -> dict[str, Any]:
        answer = await self.client.post(
            "/api/v1/vms?wait=crashed",
            json={"name": name, "cpu_cores": 1, "memory_mb": 128, **fields},
        )
        assert answer.status_code == 201, answer.text
        assert answer.headers["volant-wait"] == "met", answer.text
        return dict(answer.json())


@asynccontextmanager
async def api(
    path: Path,
    settings: ApiSettings | None = None,
    limits: Limits = FAST,
    origins: Origins = PUBLIC,
    sockets: Sequence[socket.socket] = (),
    table: Table = TABLE,
    access: Access | None = None,
    checked: bool = True,
    oci: ImageLibrary | None = None,
    plain_http: Sequence[str] = (),
    retention: Retention | None = None,
    host: Host | None = None,
    transfer: TransferSettings | None = None,
    fleet: Callable[[Store], Fleet] | None = None,
) -> AsyncIterator[Api]:
    """Serves the API with its state in `path`, on a port and on `sockets`. `checked`: every answer is held against the
    document; `fleet`: makes the part of this host in one, which the test keeps."""
    host = host or Host()
    store = Store(host, path / "volant.db", retention=retention)
    logs = VmLogs(host, path / "logs")
    await logs.prepare()
    for name in ("run", "cache", "mem"):
        (path / name).mkdir(exist_ok=True)
    journal = Child("journal", lambda: Journal(store))
    hypervisor = QemuHypervisor(host, path / "cache", accelerator="tcg")
    templates = TemplateStore(host, path / "templates")
    places: Any = {"instance": "test", "runtime_dir": path / "run", "memory_dir": path / "mem"}
    build = TemplateBuilder(host, hypervisor, templates, **places)
    warm_pool = WarmPool(
        host,
        hypervisor,
        templates,
        store.projection,
        WarmPoolLimits(each=0),
        quiet=lambda: True,
        bounds=bounds_of,
        **places,
    )
    slots = BootSlots()
    builder = Child(
        "templates",
        lambda: Templates(
            host, templates, build, warm_pool, slots.cold, store.projection, max_bytes=2**30, max_age=timedelta(days=1)
        ),
    )
    supervisor = DynamicSupervisor(intensity=3, period_s=60)
    image_events = ImageEvents(journal.ref)
    artifacts = ArtifactCache(path / "cache", path, timeout_s=60, max_mb=64, origins=origins)
    images = ImageService(
        host,
        ImageSettings(
            state_dir=path,
            cache_dir=path / "cache",
            runtime_dir=path / "run",
            plain_http=frozenset(plain_http),
            registries=partial(registries, artifacts),
        ),
        users=lambda: image_users(store.projection),
        observe=image_events.observe,
    )
    oci = oci or images
    vms = Vms(
        host=host,
        hypervisor=hypervisor,
        journal=journal.ref,
        store=store,
        logs=logs,
        artifacts=artifacts,
        oci=oci,
        templates=templates,
        builder=builder.ref,
        warm_pool=warm_pool,
        slots=slots,
        passt=Passt(host, path / "run", "test"),
        virtiofsd=Virtiofsd(
            host=host,
            runtime_dir=path / "run",
            instance="test",
            allowed=(AllowedDirectory(path / "shared"), AllowedDirectory(path / "shared/drop", True)),
            user_of=lambda tag, vm_id: None,
        ),
        secrets=Secrets(host, store, journal.ref, KeyFile(host, path / "keys" / "secrets.key")),
        network=None,
        supervisor=supervisor,
        settings=VmSettings(
            state_dir=path,
            runtime_dir=path / "run",
            cache_dir=path / "cache",
            memory_dir=path / "mem",
            disk_dir=path / "disks",
            template_dir=path / "templates",
            snapshot_dir=path / "snapshots",
            volume_dir=path / "volumes",
            kernel=path / "no-kernel",
            initramfs=path / "no-initramfs",
        ),
        instance="test",
    )
    bases = BaseFiles(vms.artifacts, oci, vms.settings)
    transfers = Transfers(
        host, store, vms.copies, bases, transfer or TransferSettings(plain_http=frozenset(plain_http))
    )
    system = StandingSystem(host)
    keys = NamedKeys(host, store, journal.ref)
    access = access or Access(settings or ApiSettings(), keys)
    root = Supervisor(
        ONE_FOR_ONE,
        intensity=5,
        period_s=60,
        children=[
            journal,
            Child("keys", partial(keys.keep, access.recheck)),
            builder,
            Child("image events", image_events.keep),
            Child("oci", images.keep),
            Child("snapshots", vms.copies.keep),
            Child("volumes", vms.volumes.keep),
            Child("vms", supervisor),
        ],
    )
    async with open_system(root):
        deps = ApiDeps(
            vms=vms,
            journal=journal.ref,
            store=store,
            logs=logs,
            backups=Backups(host, store),
            host=host,
            oci=oci,
            transfers=transfers,
            system=system,
            access=access,
            keys=keys,
            egress=no_egress(host),
            recorder=Recorder(journal.ref, store),
            fleet=None if fleet is None else fleet(store),
        )
        async with running(create_app(deps, limits, table), limits, sockets) as server:
            base = f"http://127.0.0.1:{server.port}"
            hooks = {"response": [conformance.check] if checked else []}
            async with httpx.AsyncClient(base_url=base, timeout=20, trust_env=False, event_hooks=hooks) as client:
                yield Api(server, deps, client, system, access)


def no_egress(host: Host) -> EgressActivity:
    """Returns what a daemon without egress rules shows."""

    async def allow(vm_id: int, name: str, addresses: Mapping[str, float]) -> None:
        raise AssertionError("no VM has rules")

    resolvers = VmResolvers(HostDns(), (), allow)
    settings = NetworkSettings(instance="0" * 10, subnet=DEFAULT_SUBNET)
    return EgressActivity(Networks(HostNetwork(host), settings, tuple, None, resolvers).egress, resolvers)


@asynccontextmanager
async def web_vm(path: Path, app: Any, limits: Limits = FAST, **members: Any) -> AsyncIterator[Api]:
    """Serves an API with a VM `demo` of the plugin `web`, with the real agent, and this app as its workload.

    :param members: of the plugin's manifest
    """
    async with agent_behind(path / "vsock") as way, running(bare(app)) as inner, api(path, limits=limits) as served:
        manifest = {"name": "web", "workload": {"entrypoint": ["serve"], "port": inner.port}, **members}
        assert (await served.client.post("/api/v1/plugins", json=manifest)).status_code == 201
        await served.crashed("demo", plugin="web")
        async with served.reaching(way):
            yield served


async def disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Waits until the client of a request has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def agent_behind(path: Path) -> AsyncIterator[Hypervisor]:
    """The guest's real agent, in this process, behind a vsock that is a socket at `path`."""
    agent = Server(lambda _: None)
    hypervisor = Hypervisor(path)
    hypervisor.take = agent.serve
    with hypervisor.listening():
        try:
            yield hypervisor
        finally:
            await trio.to_thread.run_sync(agent.workload.stop, 0.0)
            agent.output.finish(0.0)


@asynccontextmanager
async def websocket(url: str, **options: Any) -> AsyncIterator[WebSocketConnection]:
    """A WebSocket client. trio-websocket 0.12 leaves its socket open when the server has closed first."""
    async with open_websocket_url(url, **options) as connection:
        yield connection
    await trio.aclose_forcefully(connection._stream)
