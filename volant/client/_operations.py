"""Methods of the client, one for each operation that is a request and an answer.

Written by docs/build.py from the table of operations. Each has a deadline, and raises `ClientProblem` when the
daemon answers with an error, another `ClientError` when there is no usable answer. With an `idempotency_key` of your
own (1 to 255 visible ASCII characters) you can call a method again with the same arguments for 24 h, from another
process too, and get the first answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from volant.model import (
    BuildTemplate,
    CreateVm,
    ForkVm,
    Manifest,
    NetworkView,
    OrphanView,
    PluginView,
    Pruned,
    RestoreVm,
    SnapshotView,
    SystemStatus,
    TakeSnapshot,
    TemplateView,
    Ticket,
    Usage,
    VmMemory,
    VmView,
    WantTicket,
    check_name,
)

from ._calls import body_of, duration, flag, pairs, part, words
from ._transport import Operations, Request, decode


class VmsOperations(Operations):
    async def list(
        self,
        *,
        status: Collection[str] = (),
        plugin: str | Sequence[str] | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int | None = None,
        cursor: int | None = None,
    ) -> Sequence[VmView]:
        """List VMs, by id.

        :param status: in one of these states
        :param plugin: of one of these plugins
        :param labels: `key=value`; all of them must hold
        :param limit: at most so many
        :param cursor: as in the `Link` before; opaque
        """
        return await self._transport.get(
            "/api/v1/vms",
            list[VmView],
            query={"status": words(status), "plugin": plugin, "label": pairs(labels), "limit": limit, "cursor": cursor},
        )

    async def create(
        self, request: RestoreVm | CreateVm | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> VmView:
        """Create a VM; it is durable when this is answered.

        With `from_snapshot` its first boot continues from that snapshot, as a copy with an identity of its own.
        Every later boot is an ordinary one, with the disk as it was left. If the first fails the VM is `crashed`;
        no cold boot follows.
        """
        return decode(await self._transport.once("/api/v1/vms", key=idempotency_key, body=body_of(request)), VmView)

    async def get(self, name: str) -> VmView:
        """Get a VM."""
        return await self._transport.get(f"/api/v1/vms/{check_name(name, 'name')}", VmView)

    async def delete(self, name: str, *, timeout_s: float = 75) -> None:
        """Delete a VM.

        A second request joins the first. A client that leaves cancels nothing; past 60 s it is 503.

        :param timeout_s: how long to wait for the answer
        """
        await self._transport.send(Request("DELETE", f"/api/v1/vms/{check_name(name, 'name')}"), timeout_s=timeout_s)

    async def start(self, name: str, *, idempotency_key: str | None = None) -> VmView:
        """Start a VM; nothing happens to one that runs."""
        return decode(
            await self._transport.once(f"/api/v1/vms/{check_name(name, 'name')}/start", key=idempotency_key), VmView
        )

    async def stop(self, name: str, *, grace_s: float | None = None, idempotency_key: str | None = None) -> VmView:
        """Ask the guest to shut down, then kill it; nothing happens to a VM that is stopped.

        :param grace_s: how long the guest has before it is killed: default `10s`, at most `10m`
        """
        return decode(
            await self._transport.once(
                f"/api/v1/vms/{check_name(name, 'name')}/stop", key=idempotency_key, query={"grace": duration(grace_s)}
            ),
            VmView,
        )

    async def restart(self, name: str, *, grace_s: float | None = None, idempotency_key: str | None = None) -> VmView:
        """Stop a VM and start it again.

        :param grace_s: how long the guest has before it is killed: default `10s`, at most `10m`
        """
        return decode(
            await self._transport.once(
                f"/api/v1/vms/{check_name(name, 'name')}/restart",
                key=idempotency_key,
                query={"grace": duration(grace_s)},
            ),
            VmView,
        )

    async def pause(self, name: str, *, idempotency_key: str | None = None) -> VmView:
        """Pause a VM once it runs. Its memory, its process and open streams stay."""
        return decode(
            await self._transport.once(f"/api/v1/vms/{check_name(name, 'name')}/pause", key=idempotency_key), VmView
        )

    async def resume(self, name: str, *, idempotency_key: str | None = None) -> VmView:
        """Resume a paused VM and set its clock."""
        return decode(
            await self._transport.once(f"/api/v1/vms/{check_name(name, 'name')}/resume", key=idempotency_key), VmView
        )

    async def recover(self, name: str, *, idempotency_key: str | None = None) -> VmView:
        """Take control again of a VM whose reason is `control_lost`."""
        return decode(
            await self._transport.once(f"/api/v1/vms/{check_name(name, 'name')}/recover", key=idempotency_key), VmView
        )

    async def fork(
        self,
        name: str,
        request: ForkVm | Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        timeout_s: float = 600,
    ) -> Sequence[VmView]:
        """Create VMs that continue from where this one is; it keeps running itself.

        Each has the memory and disk of this one, and receives its own identity before it is `running`. The VM has
        to be running or paused. With `wait`, `Volant-Wait` is `met` when it is for all.

        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.once(
                f"/api/v1/vms/{check_name(name, 'name')}/fork",
                key=idempotency_key,
                body=body_of(request or ForkVm()),
                timeout_s=timeout_s,
            ),
            list[VmView],
        )

    async def inspect(self, name: str) -> dict[str, Any]:
        """Show what the daemon does with a VM, to find a fault; its shape is no contract."""
        return await self._transport.get(f"/api/v1/vms/{check_name(name, 'name')}/inspect", dict[str, Any])

    async def memory(self, name: str) -> VmMemory:
        """Measure the memory of a VM, as its guest and as the host sees it.

        Costs the kernel some milliseconds for each GiB, so it is not for every second. 409: there is no process.
        """
        return await self._transport.get(f"/api/v1/vms/{check_name(name, 'name')}/memory", VmMemory)


class SnapshotsOperations(Operations):
    async def take(
        self,
        name: str,
        request: TakeSnapshot | Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        timeout_s: float = 600,
    ) -> SnapshotView:
        """Keep a VM as it is now: memory, devices and disk.

        The guest is paused for a moment, and what is copied then is written to the disk while it runs again. A
        client that leaves cancels nothing. The VM has to be running or paused; a command that ends that ends this
        too.

        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.once(
                f"/api/v1/vms/{check_name(name, 'name')}/snapshots",
                key=idempotency_key,
                body=body_of(request or TakeSnapshot()),
                timeout_s=timeout_s,
            ),
            SnapshotView,
        )

    async def list_of_vm(self, name: str) -> Sequence[SnapshotView]:
        """List the snapshots of a VM."""
        return await self._transport.get(f"/api/v1/vms/{check_name(name, 'name')}/snapshots", list[SnapshotView])

    async def list(self) -> Sequence[SnapshotView]:
        """List all snapshots, also those of deleted VMs."""
        return await self._transport.get("/api/v1/snapshots", list[SnapshotView])

    async def get(self, snapshot: str) -> SnapshotView:
        """Get a snapshot."""
        return await self._transport.get(f"/api/v1/snapshots/{check_name(snapshot, 'snapshot')}", SnapshotView)

    async def remove(self, snapshot: str) -> None:
        """Remove a snapshot; VMs made from it keep running."""
        await self._transport.send(Request("DELETE", f"/api/v1/snapshots/{check_name(snapshot, 'snapshot')}"))


class PluginsOperations(Operations):
    async def list(self) -> Sequence[PluginView]:
        """List plugins."""
        return await self._transport.get("/api/v1/plugins", list[PluginView])

    async def install(
        self, request: Manifest | Mapping[str, Any], *, idempotency_key: str | None = None, timeout_s: float = 900
    ) -> PluginView:
        """Install a plugin from its manifest.

        `boot` may name files of the daemon's host by path: below a directory of the setting `artifact_dirs`; or, at
        a Unix socket, and without a key for the daemon's own user over loopback, what the client's user can read.
        These are taken into the cache before the answer. Else it is 403 `artifact-not-allowed` or 400
        `artifact-unavailable`: send the file with `PUT /api/v1/artifacts/{sha256}`, then install the plugin.

        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.once(
                "/api/v1/plugins", key=idempotency_key, body=body_of(request), timeout_s=timeout_s
            ),
            PluginView,
        )

    async def get(self, name: str) -> PluginView:
        """Get a plugin."""
        return await self._transport.get(f"/api/v1/plugins/{check_name(name, 'name')}", PluginView)

    async def remove(self, name: str) -> None:
        """Remove a plugin that no VM uses."""
        await self._transport.send(Request("DELETE", f"/api/v1/plugins/{check_name(name, 'name')}"))

    async def manifest(self, name: str) -> Manifest:
        """Get what a plugin was installed from."""
        return await self._transport.get(f"/api/v1/plugins/{check_name(name, 'name')}/manifest", Manifest)

    async def enable(self, name: str, enabled: bool, *, idempotency_key: str | None = None) -> PluginView:
        """Let new VMs use a plugin, or not."""
        return decode(
            await self._transport.once(
                f"/api/v1/plugins/{check_name(name, 'name')}/enabled", key=idempotency_key, body={"enabled": enabled}
            ),
            PluginView,
        )


class NetworksOperations(Operations):
    async def list(self) -> Sequence[NetworkView]:
        """List networks in which VMs reach each other."""
        return await self._transport.get("/api/v1/networks", list[NetworkView])

    async def create(self, name: str, *, idempotency_key: str | None = None) -> NetworkView:
        """Create a network.

        VMs that are created with its name as `network` are in it, and reach each other there, by their names.
        """
        return decode(
            await self._transport.once("/api/v1/networks", key=idempotency_key, body={"name": name}), NetworkView
        )

    async def get(self, name: str) -> NetworkView:
        """Get a network, with the VMs in it."""
        return await self._transport.get(f"/api/v1/networks/{check_name(name, 'name')}", NetworkView)

    async def remove(self, name: str) -> None:
        """Remove a network that no VM is in."""
        await self._transport.send(Request("DELETE", f"/api/v1/networks/{check_name(name, 'name')}"))


class TemplatesOperations(Operations):
    async def list(self) -> Sequence[TemplateView]:
        """List the templates that new VMs are cloned from."""
        return await self._transport.get("/api/v1/templates", list[TemplateView])

    async def build(
        self, request: BuildTemplate | Mapping[str, Any] | None = None, *, timeout_s: float = 600
    ) -> TemplateView:
        """Build the template of a kind of VM, and wait for it.

        One that is there is returned at once; one that is being built is waited for. A client that leaves cancels
        nothing.

        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.send(
                Request("POST", "/api/v1/templates", body=body_of(request or BuildTemplate())), timeout_s=timeout_s
            ),
            TemplateView,
        )

    async def remove(self, digest: str) -> None:
        """Remove a template; its clones keep running."""
        await self._transport.send(Request("DELETE", f"/api/v1/templates/{part(digest, 'digest')}"))


class SystemOperations(Operations):
    async def status(self) -> SystemStatus:
        """Show figures of the daemon and its host."""
        return await self._transport.get("/api/v1/system/status", SystemStatus)

    async def drain(self, *, stop_vms: bool = False, grace_s: float | None = None) -> SystemStatus:
        """Let no VM be created or start, for maintenance.

        What would create or start a VM is 503, `urn:volant:error:draining`. Running VMs keep running. One whose
        restart policy is due, or whose host or guest has rebooted, waits. Asked again, `draining_since` stays. The
        answer comes before VMs have stopped: their events, or `GET /api/v1/vms/{name}?wait=stopped`, report that.

        :param stop_vms: stop VMs that are up, some at a time; they start again after `undrain`
        :param grace_s: with `stop_vms`, for each guest: default `10s`, at most `10m`
        """
        return decode(
            await self._transport.send(
                Request("POST", "/api/v1/system/drain", query={"stop_vms": flag(stop_vms), "grace": duration(grace_s)})
            ),
            SystemStatus,
        )

    async def undrain(self) -> SystemStatus:
        """Let VMs start again; those that waited do."""
        return decode(await self._transport.send(Request("POST", "/api/v1/system/undrain")), SystemStatus)

    async def info(self) -> dict[str, Any]:
        """Show versions, addresses, the accelerator and the reason for it."""
        return await self._transport.get("/api/v1/system/info", dict[str, Any])

    async def orphans(self) -> Sequence[OrphanView]:
        """List hypervisors that run and that no VM owns.

        The daemon never touches them. Adopt one, or kill it.
        """
        return await self._transport.get("/api/v1/system/orphans", list[OrphanView])

    async def adopt_orphan(self, mark: str, *, name: str | None = None) -> VmView:
        """Make a VM of an orphaned hypervisor.

        Name, size and disk are as its command line says; plugin `base`, no labels, no restart policy.

        :param name: instead of its own name
        """
        return decode(
            await self._transport.send(
                Request("POST", f"/api/v1/system/orphans/{part(mark, 'mark')}/adopt", query={"name": name})
            ),
            VmView,
        )

    async def kill_orphan(self, mark: str) -> None:
        """Kill an orphaned hypervisor; its disk stays."""
        await self._transport.send(Request("POST", f"/api/v1/system/orphans/{part(mark, 'mark')}/kill"))

    async def tree(self) -> dict[str, Any]:
        """Show the supervisor tree."""
        return await self._transport.get("/api/v1/system/tree", dict[str, Any])

    async def df(self) -> Usage:
        """Show what takes space on the host for the daemon."""
        return await self._transport.get("/api/v1/system/df", Usage)

    async def prune(
        self,
        *,
        dry_run: bool = False,
        kinds: Collection[str] = (),
        unused_for_s: float | None = None,
        timeout_s: float = 330,
    ) -> Pruned:
        """Remove what nothing uses.

        What a VM, a plugin or a process uses stays, also when that begins meanwhile.

        :param dry_run: say what would go, and remove nothing
        :param kinds: only these; default `log`, `image`, `medium`, `template`, `leftover`; `disk`, `snapshot`,
            `database` only when named
        :param unused_for_s: of templates only those from which no VM began for so long: `12h`
        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.send(
                Request(
                    "POST",
                    "/api/v1/system/prune",
                    query={"dry_run": flag(dry_run), "kind": words(kinds), "unused_for": duration(unused_for_s)},
                ),
                timeout_s=timeout_s,
            ),
            Pruned,
        )

    async def ticket(self, path: str | None = None) -> Ticket:
        """Create a ticket for a browser, which can't set headers on some streams."""
        return decode(
            await self._transport.send(Request("POST", "/api/v1/tickets", body=body_of(WantTicket(path)))), Ticket
        )
