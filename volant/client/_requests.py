"""The client's methods that consist of one request and one answer, on any transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from volant.model import Health, VmView, check_name

from ._browser import Browser, find_browser
from ._calls import duration, part
from ._errors import Command, UnexpectedAnswer
from ._exec import RemoteSession, RemoteSessions
from ._operations import (
    AuthOperations,
    FleetOperations,
    ForksOperations,
    HostsOperations,
    ImagesOperations,
    KeysOperations,
    NetworksOperations,
    PluginsOperations,
    ProjectsOperations,
    SecretsOperations,
    SnapshotsOperations,
    SystemOperations,
    TemplatesOperations,
    VmsOperations,
    VolumesOperations,
)
from ._transport import Operations, Request, Transport, decode


class Requests(Operations):
    """The methods of a client that only need a transport, grouped like the API's paths."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self.vms = VmsRequests(transport)
        self.plugins = PluginsOperations(transport)
        self.networks = NetworksOperations(transport)
        self.volumes = VolumesOperations(transport)
        self.keys = KeysOperations(transport)
        self.secrets = SecretsOperations(transport)
        self.images = ImagesOperations(transport)
        self.templates = TemplatesOperations(transport)
        self.snapshots = SnapshotsOperations(transport)
        self.forks = ForksOperations(transport)
        self.projects = ProjectsOperations(transport)
        self.auth = AuthOperations(transport)
        self.hosts = HostsOperations(transport)
        self.fleet = FleetOperations(transport)
        self.system = SystemRequests(transport)

    async def healthz(self) -> Health:
        """Returns the daemon's health. A status other than `ok` raises no error."""
        return decode(await self._transport.send(Request("GET", "/healthz", also=(503,))), Health)

    async def newest_event(self) -> str:
        """Returns the id of the newest event."""
        answer = await self._transport.send(Request("GET", "/api/v1/vms", {"limit": 1}))
        event_id = answer.headers.get("volant-event-id")
        if event_id is None:
            raise UnexpectedAnswer("the daemon's list of VMs lacks Volant-Event-Id")
        return event_id


class VmsRequests(VmsOperations):
    """The operations of VMs, and requests to their guests."""

    async def apply(
        self, name: str, command: Command, *, grace_s: float | None = None, idempotency_key: str | None = None
    ) -> VmView:
        """Applies a command by its name; `grace_s` is for `stop` and `restart`."""
        path = f"{vm_path(name)}/{command}"
        query = {"grace": duration(grace_s)}
        return decode(await self._transport.once(path, key=idempotency_key, query=query), VmView)

    async def exec_sessions(self, name: str) -> Sequence[RemoteSession]:
        """Returns the detached commands of a VM, including recently ended ones, oldest first."""
        return (await self._transport.get(f"{vm_path(name)}/agent/v1/exec/sessions", RemoteSessions)).sessions

    async def end_exec_session(self, name: str, identifier: str) -> None:
        """Kills a detached command, and removes it."""
        path = f"{vm_path(name)}/agent/v1/exec/sessions/{part(identifier, 'identifier')}"
        await self._transport.send(Request("DELETE", path))

    async def openapi(self, name: str) -> dict[str, Any]:
        """Returns the workload's own OpenAPI document, with server URLs that lead through the daemon."""
        return await self._transport.get(f"{vm_path(name)}/openapi", dict[str, Any])

    async def browser(self, name: str) -> Browser:
        """Returns the addresses of the browser in a VM. Waits up to a minute for a browser that was just started."""
        return await find_browser(self._transport, f"/ws/v1/vms/{checked(name)}/devtools")

    async def agent_info(self, name: str) -> dict[str, Any]:
        """Returns the agent's report about itself and its guest (`volant.model.agent.Info`)."""
        return await self._transport.get(f"{vm_path(name)}/agent/v1/info", dict[str, Any])

    async def agent_health(self, name: str) -> dict[str, Any]:
        """Returns the agent's health and its workload's (`volant.model.agent.Healthz`)."""
        return await self._transport.get(f"{vm_path(name)}/agent/healthz", dict[str, Any])


class SystemRequests(SystemOperations):
    """The operations of the daemon, its tasks and its metrics."""

    async def tasks(self) -> str:
        """Returns the position of every task and thread of the daemon, for people."""
        return (await self._transport.send(Request("GET", "/api/v1/system/tasks"))).text

    async def metrics(self) -> str:
        """Returns the metrics as Prometheus text."""
        return (await self._transport.send(Request("GET", "/metrics"))).text


def checked(name: str) -> str:
    """Returns the name of a VM after a check, as it becomes part of a path. :raises Problem: 400, the name is
    invalid."""
    return check_name(name, "name")


def vm_path(name: str) -> str:
    """Returns the path of a VM. :raises Problem: 400, the name is invalid."""
    return f"/api/v1/vms/{checked(name)}"
