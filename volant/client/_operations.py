"""Methods of the client, one for each operation that is a request and an answer.

Written by docs/build.py from the table of operations. Each has a deadline, and raises `ClientProblem` when the
daemon answers with an error, another `ClientError` when there is no usable answer. With an `idempotency_key` of your
own (1 to 255 visible ASCII characters) you can call a method again with the same arguments for 24 h, from another
process too, and get the first answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from volant.model import (
    ApiKeyView,
    AuthView,
    BuildTemplate,
    CloneVolume,
    CreateApiKey,
    CreateProject,
    CreateVm,
    CreateVolume,
    FleetView,
    ForkTree,
    ForkVm,
    HostMoves,
    HostView,
    ImageView,
    Manifest,
    NetworkView,
    NewApiKey,
    OpenPort,
    OrphanView,
    PluginView,
    PortOriginView,
    ProjectView,
    Pruned,
    PrunedImages,
    PullImage,
    PullSnapshot,
    PullView,
    PushSnapshot,
    Quota,
    ReencryptedSecrets,
    RegistrySnapshot,
    RestoreVm,
    RotateApiKey,
    SecretView,
    SetEgress,
    SetSecret,
    SnapshotView,
    SystemStatus,
    TakeSnapshot,
    TemplateView,
    Ticket,
    TransferView,
    Usage,
    VmMemory,
    VmStats,
    VmView,
    VolumeView,
    WantTicket,
    check_name,
)

from ._calls import body_of, duration, flag, pairs, part, registry_headers, words
from ._transport import Operations, Request, decode


class VmsOperations(Operations):
    waits_for: ClassVar[Mapping[str, str]] = {
        "start": "running",
        "stop": "stopped",
        "restart": "running",
        "pause": "paused",
        "resume": "running",
        "recover": "running",
    }

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

        :param status: only VMs in one of these states
        :param plugin: only VMs of one of these plugins
        :param labels: only VMs with all of these labels, as `key=value`
        :param limit: maximum number of results
        :param cursor: opaque cursor from the previous `Link` header
        """
        return await self._transport.get(
            "/api/v1/vms",
            list[VmView],
            query={"status": words(status), "plugin": plugin, "label": pairs(labels), "limit": limit, "cursor": cursor},
        )

    async def create(
        self,
        request: RestoreVm | CreateVm | Mapping[str, Any],
        *,
        registry_auth: str | None = None,
        idempotency_key: str | None = None,
    ) -> VmView:
        """Create a VM; it is durable when the request returns.

        With `image`, the image's manifest and configuration are fetched before the request returns, and its layers
        while the VM boots. The body can override the image's configuration of the program.  With `from_snapshot`,
        the first boot continues from that snapshot, as a copy with its own identity. Every later boot is an
        ordinary one with the VM's disk. If the first boot fails, the VM is `crashed`; it does not boot cold.

        :param registry_auth: credentials for registries: the base64 of an auth file
        """
        return decode(
            await self._transport.once(
                "/api/v1/vms", key=idempotency_key, body=body_of(request), headers=registry_headers(registry_auth)
            ),
            VmView,
        )

    async def get(self, name: str) -> VmView:
        """Get a VM."""
        return await self._transport.get(f"/api/v1/vms/{check_name(name, 'name')}", VmView)

    async def delete(self, name: str, *, timeout_s: float = 75) -> None:
        """Delete a VM with its disk.

        A second request joins the first. The deletion continues if the client disconnects; after 60 s the answer is
        503.

        :param timeout_s: how long to wait for the answer
        """
        await self._transport.send(Request("DELETE", f"/api/v1/vms/{check_name(name, 'name')}"), timeout_s=timeout_s)

    async def start(self, name: str, *, idempotency_key: str | None = None) -> VmView:
        """Start a VM; does nothing if it runs."""
        return decode(
            await self._transport.once(f"/api/v1/vms/{check_name(name, 'name')}/start", key=idempotency_key), VmView
        )

    async def stop(self, name: str, *, grace_s: float | None = None, idempotency_key: str | None = None) -> VmView:
        """Ask the guest to shut down, then kill it; does nothing if the VM is stopped.

        :param grace_s: how long the guest may take to shut down before it is killed: default `10s`, at most `10m`
        """
        return decode(
            await self._transport.once(
                f"/api/v1/vms/{check_name(name, 'name')}/stop", key=idempotency_key, query={"grace": duration(grace_s)}
            ),
            VmView,
        )

    async def restart(self, name: str, *, grace_s: float | None = None, idempotency_key: str | None = None) -> VmView:
        """Stop a VM and start it again.

        :param grace_s: how long the guest may take to shut down before it is killed: default `10s`, at most `10m`
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
        """Regain control of a VM whose reason is `control_lost`."""
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
        """Create VMs that continue from this VM's present state; it keeps running.

        Each has this VM's memory and disk, and receives its own identity before it is `running`. The VM must be
        running or paused. With `wait`, `Volant-Wait` is `met` when all of them are in a wanted state.

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
        """Show the daemon's internal state of a VM, to find a fault. The format may change."""
        return await self._transport.get(f"/api/v1/vms/{check_name(name, 'name')}/inspect", dict[str, Any])

    async def memory(self, name: str) -> VmMemory:
        """Measure the memory of a VM, as its guest and as the host sees it.

        A measurement costs the kernel some milliseconds for each GiB, so don't repeat it every second. 409 if the
        VM has no process.
        """
        return await self._transport.get(f"/api/v1/vms/{check_name(name, 'name')}/memory", VmMemory)

    async def stats(self) -> Sequence[VmStats]:
        """Measure each VM's use of the host: processor, memory, disks, network.

        The figures count from the start of the VM's process; the difference of two measurements is the use between
        them.
        """
        return await self._transport.get("/api/v1/stats/vms", list[VmStats])

    async def open_port(self, name: str, request: OpenPort | Mapping[str, Any]) -> PortOriginView:
        """Open a port of a VM at an origin of its own, where the scripts and cookies of its pages work.

        On loopback the origin is `{port}-{id}.localhost`. Otherwise it is below a name with `*.` in the daemon's
        `allowed_hosts`; 409 if there is none, or if the VM is on another host of the fleet. If keys are required,
        the link carries a grant that is valid as long as the credentials of this request, at most 12 hours.
        """
        return decode(
            await self._transport.send(
                Request("POST", f"/api/v1/vms/{check_name(name, 'name')}/origins", body=body_of(request))
            ),
            PortOriginView,
        )


class SnapshotsOperations(Operations):
    async def take(
        self,
        name: str,
        request: TakeSnapshot | Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        timeout_s: float = 600,
    ) -> SnapshotView:
        """Save a VM's present memory, devices and disk.

        The guest is paused briefly, and the copy is written to the disk while it runs again. The snapshot continues
        if the client disconnects. The VM must be running or paused; a command that ends this state also ends the
        snapshot.

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
        """List all snapshots, including those of deleted VMs. Replicas are not listed, as they belong to their VMs."""
        return await self._transport.get("/api/v1/snapshots", list[SnapshotView])

    async def pull(
        self,
        request: PullSnapshot | Mapping[str, Any],
        *,
        registry_auth: str | None = None,
        idempotency_key: str | None = None,
        timeout_s: float = 21660.0,
    ) -> SnapshotView:
        """Fetch a snapshot from a registry, and wait until it is on the disk.

        Chunks that this host already has are not fetched: those of its template, of other snapshots of the project,
        and of an earlier call. The transfer ends if the client disconnects. The files that the snapshot needs are
        matched by digest. A missing OCI image is fetched; the error names any other missing file.

        :param registry_auth: credentials for registries: the base64 of an auth file
        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.once(
                "/api/v1/snapshots/pull",
                key=idempotency_key,
                body=body_of(request),
                headers=registry_headers(registry_auth),
                timeout_s=timeout_s,
            ),
            SnapshotView,
        )

    async def push(
        self,
        snapshot: str,
        request: PushSnapshot | Mapping[str, Any],
        *,
        registry_auth: str | None = None,
        timeout_s: float = 21660.0,
    ) -> RegistrySnapshot:
        """Send a snapshot to a registry, and wait until it is completely there.

        Chunks that the registry already has are not sent, such as those of other snapshots in the same repository.
        The transfer ends if the client disconnects; the next call continues it. The snapshot contains the guest's
        memory, including its secrets.

        :param registry_auth: credentials for registries: the base64 of an auth file
        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.send(
                Request(
                    "POST",
                    f"/api/v1/snapshots/{check_name(snapshot, 'snapshot')}/push",
                    body=body_of(request),
                    headers=registry_headers(registry_auth),
                ),
                timeout_s=timeout_s,
            ),
            RegistrySnapshot,
        )

    async def transfers(self) -> Sequence[TransferView]:
        """List the running transfers of snapshots to and from registries."""
        return await self._transport.get("/api/v1/transfers", list[TransferView])

    async def get(self, snapshot: str) -> SnapshotView:
        """Get a snapshot."""
        return await self._transport.get(f"/api/v1/snapshots/{check_name(snapshot, 'snapshot')}", SnapshotView)

    async def delete(self, snapshot: str) -> None:
        """Delete a snapshot; VMs made from it keep running."""
        await self._transport.send(Request("DELETE", f"/api/v1/snapshots/{check_name(snapshot, 'snapshot')}"))


class ForksOperations(Operations):
    async def list(self, *, limit: int | None = None, cursor: str | None = None) -> ForkTree:
        """Show the fork tree: VMs and snapshots that are copies or were copied, sources first.

        It includes deleted ones, as long as their events are kept, and leaves out VMs that are no copy and were
        never copied.

        :param limit: maximum number of nodes; default 100
        :param cursor: the `next_cursor` of the previous page
        """
        return await self._transport.get("/api/v1/forks", ForkTree, query={"limit": limit, "cursor": cursor})


class PluginsOperations(Operations):
    async def list(self) -> Sequence[PluginView]:
        """List plugins."""
        return await self._transport.get("/api/v1/plugins", list[PluginView])

    async def install(
        self, request: Manifest | Mapping[str, Any], *, idempotency_key: str | None = None, timeout_s: float = 900
    ) -> PluginView:
        """Install a plugin from its manifest.

        `boot` names files by URL or by path. Administrators may name files of the daemon's host by path, below a
        directory of the setting `artifact_dirs`; they are read when a VM boots. Other paths get 403
        `artifact-not-allowed`: send the file with `PUT /api/v1/artifacts/{sha256}`, then install the plugin. An OCI
        image in a file of the host must be below `artifact_dirs`, too. A plugin of a fleet can't name files: 422
        `file-of-one-host`.

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

    async def delete(self, name: str) -> None:
        """Delete a plugin that no VM uses."""
        await self._transport.send(Request("DELETE", f"/api/v1/plugins/{check_name(name, 'name')}"))

    async def manifest(self, name: str) -> Manifest:
        """Get the manifest of a plugin."""
        return await self._transport.get(f"/api/v1/plugins/{check_name(name, 'name')}/manifest", Manifest)

    async def enable(self, name: str, enabled: bool, *, idempotency_key: str | None = None) -> PluginView:
        """Allow or forbid new VMs to use a plugin."""
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

        VMs created with its name as `network` reach each other in it by their names.
        """
        return decode(
            await self._transport.once("/api/v1/networks", key=idempotency_key, body={"name": name}), NetworkView
        )

    async def get(self, name: str) -> NetworkView:
        """Get a network, with the VMs in it."""
        return await self._transport.get(f"/api/v1/networks/{check_name(name, 'name')}", NetworkView)

    async def delete(self, name: str) -> None:
        """Delete a network that no VM is in."""
        await self._transport.send(Request("DELETE", f"/api/v1/networks/{check_name(name, 'name')}"))


class ImagesOperations(Operations):
    async def list(self, *, reference: str | None = None) -> Sequence[ImageView]:
        """List the OCI images in the cache.

        :param reference: only the image that this reference last resolved to
        """
        return await self._transport.get("/api/v1/images", list[ImageView], query={"reference": reference})

    async def pulls(self) -> Sequence[PullView]:
        """List the fetches of OCI images that are under way."""
        return await self._transport.get("/api/v1/images/pulls", list[PullView])

    async def pull(
        self, request: PullImage | Mapping[str, Any], *, registry_auth: str | None = None, timeout_s: float = 3600.0
    ) -> ImageView:
        """Fetch an OCI image, and wait until it is in the cache.

        The registry is not asked about a tag that the cache knows, unless `refresh` is set. If the client
        disconnects, the fetch continues for 10 minutes, and another request for the same image waits for it.

        :param registry_auth: credentials for registries: the base64 of an auth file
        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.send(
                Request("POST", "/api/v1/images/pull", body=body_of(request), headers=registry_headers(registry_auth)),
                timeout_s=timeout_s,
            ),
            ImageView,
        )

    async def prune(
        self,
        *,
        reference: str | None = None,
        max_mb: int | None = None,
        unused_for_s: float | None = None,
        dry_run: bool = False,
        timeout_s: float = 330,
    ) -> PrunedImages:
        """Remove OCI images that no VM and no snapshot uses, the least recently used first.

        :param reference: only this reference, and its image unless something else needs it
        :param max_mb: stop once all images together take up at most this; default 0
        :param unused_for_s: only images that were not used for this time: `12h`
        :param dry_run: report what would be removed, without removing it
        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.send(
                Request(
                    "POST",
                    "/api/v1/images/prune",
                    query={
                        "reference": reference,
                        "max_mb": max_mb,
                        "unused_for": duration(unused_for_s),
                        "dry_run": flag(dry_run),
                    },
                ),
                timeout_s=timeout_s,
            ),
            PrunedImages,
        )

    async def get(self, digest: str) -> ImageView:
        """Get an OCI image, by its digest or at least 6 digits of it."""
        return await self._transport.get(f"/api/v1/images/{part(digest, 'digest')}", ImageView)

    async def delete(self, digest: str) -> None:
        """Delete an OCI image that no VM and no snapshot uses.

        If the request is for a project, other projects keep the image.
        """
        await self._transport.send(Request("DELETE", f"/api/v1/images/{part(digest, 'digest')}"))


class VolumesOperations(Operations):
    async def list(self) -> Sequence[VolumeView]:
        """List volumes, which VMs mount."""
        return await self._transport.get("/api/v1/volumes", list[VolumeView])

    async def create(
        self, request: CreateVolume | Mapping[str, Any], *, idempotency_key: str | None = None, timeout_s: float = 150
    ) -> VolumeView:
        """Create a volume: an ext4 filesystem in a file of the host, which takes up only the space that was written.

        VMs created with `name:/path` in `volumes` mount it there. It is kept when they are deleted.

        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.once(
                "/api/v1/volumes", key=idempotency_key, body=body_of(request), timeout_s=timeout_s
            ),
            VolumeView,
        )

    async def get(self, name: str) -> VolumeView:
        """Get a volume, with the VMs that mount it."""
        return await self._transport.get(f"/api/v1/volumes/{check_name(name, 'name')}", VolumeView)

    async def delete(self, name: str) -> None:
        """Delete a volume that no VM refers to, running or not."""
        await self._transport.send(Request("DELETE", f"/api/v1/volumes/{check_name(name, 'name')}"))

    async def resize(self, name: str, size_mb: int, *, idempotency_key: str | None = None) -> VolumeView:
        """Grow a volume, and the filesystem in a VM that writes to it. A volume can't shrink."""
        return decode(
            await self._transport.once(
                f"/api/v1/volumes/{check_name(name, 'name')}/resize", key=idempotency_key, body={"size_mb": size_mb}
            ),
            VolumeView,
        )

    async def clone(
        self,
        name: str,
        request: CloneVolume | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        timeout_s: float = 3700,
    ) -> VolumeView:
        """Copy a volume that no VM writes to.

        If the host's file system supports it, the copy takes up no space until either volume is written to.

        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.once(
                f"/api/v1/volumes/{check_name(name, 'name')}/clone",
                key=idempotency_key,
                body=body_of(request),
                timeout_s=timeout_s,
            ),
            VolumeView,
        )


class SecretsOperations(Operations):
    async def list(self) -> Sequence[SecretView]:
        """List secrets, which VMs receive as environment variables or files. Their values are never shown."""
        return await self._transport.get("/api/v1/secrets", list[SecretView])

    async def get(self, name: str) -> SecretView:
        """Get a secret's metadata and the VMs that refer to it. Its value is never shown."""
        return await self._transport.get(f"/api/v1/secrets/{check_name(name, 'name')}", SecretView)

    async def set(self, name: str, request: SetSecret | Mapping[str, Any]) -> SecretView:
        """Set the value of a new or present secret.

        It is stored encrypted. VMs that refer to it receive the value at their next boot.
        """
        return decode(
            await self._transport.send(
                Request("PUT", f"/api/v1/secrets/{check_name(name, 'name')}", body=body_of(request))
            ),
            SecretView,
        )

    async def delete(self, name: str) -> None:
        """Delete a secret that no VM refers to, running or not."""
        await self._transport.send(Request("DELETE", f"/api/v1/secrets/{check_name(name, 'name')}"))

    async def reencrypt(self, *, timeout_s: float = 300) -> ReencryptedSecrets:
        """Re-encrypt the secrets of all projects with the first key of the key file. Put the new key there first.

        An interrupted request can be repeated.

        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.send(Request("POST", "/api/v1/system/secrets/reencrypt"), timeout_s=timeout_s),
            ReencryptedSecrets,
        )


class TemplatesOperations(Operations):
    async def list(self) -> Sequence[TemplateView]:
        """List the templates that new VMs are cloned from.

        If the request is for a project, only templates for its plugins.
        """
        return await self._transport.get("/api/v1/templates", list[TemplateView])

    async def build(
        self, request: BuildTemplate | Mapping[str, Any] | None = None, *, timeout_s: float = 600
    ) -> TemplateView:
        """Build the template for a plugin and a VM size, and wait for it.

        An existing template is returned at once; the request waits for one that is being built. The build continues
        if the client disconnects. For the limits of the project, a build counts as the creation of such a VM.

        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.send(
                Request("POST", "/api/v1/templates", body=body_of(request or BuildTemplate())), timeout_s=timeout_s
            ),
            TemplateView,
        )

    async def delete(self, digest: str) -> None:
        """Delete a template; its clones keep running."""
        await self._transport.send(Request("DELETE", f"/api/v1/templates/{part(digest, 'digest')}"))


class ProjectsOperations(Operations):
    async def list(self) -> Sequence[ProjectView]:
        """List projects: all for an administrator, otherwise the caller's own."""
        return await self._transport.get("/api/v1/projects", list[ProjectView])

    async def create(
        self, request: CreateProject | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> ProjectView:
        """Create a project: a separate namespace with limits.

        A key has one project. An administrator chooses one with the header `Volant-Project`, or `project` in the
        query.
        """
        return decode(
            await self._transport.once("/api/v1/projects", key=idempotency_key, body=body_of(request)), ProjectView
        )

    async def get(self, name: str) -> ProjectView:
        """Get a project, with its limits and its use of them."""
        return await self._transport.get(f"/api/v1/projects/{check_name(name, 'name')}", ProjectView)

    async def set_quota(self, name: str, request: Quota | Mapping[str, Any] | None = None) -> ProjectView:
        """Replace the limits of a project; a missing or null member means no limit.

        VMs, disks and snapshots that already exceed a new limit stay. Further ones get 409 `quota-exceeded`, or 429
        for too many creates per minute.
        """
        return decode(
            await self._transport.send(
                Request("PUT", f"/api/v1/projects/{check_name(name, 'name')}/quota", body=body_of(request or Quota()))
            ),
            ProjectView,
        )

    async def set_egress(self, name: str, request: SetEgress | Mapping[str, Any]) -> ProjectView:
        """Replace the egress policy of a project, which limits the destinations of its VMs.

        New VMs without a policy of their own use it. Requests for more get 409 `egress-not-allowed`, as do forks
        and restored VMs whose original may connect to more. Present VMs keep their policies.
        """
        return decode(
            await self._transport.send(
                Request("PUT", f"/api/v1/projects/{check_name(name, 'name')}/egress", body=body_of(request))
            ),
            ProjectView,
        )

    async def delete(self, name: str) -> None:
        """Delete an empty project that no key belongs to.

        This also deletes the logs of its deleted VMs and its image names. A new project with the same name starts
        empty.
        """
        await self._transport.send(Request("DELETE", f"/api/v1/projects/{check_name(name, 'name')}"))


class AuthOperations(Operations):
    async def get(self) -> AuthView:
        """Get the authentication methods: whether the daemon requires credentials, and where to sign in."""
        return await self._transport.get("/api/v1/auth", AuthView)


class KeysOperations(Operations):
    async def list(self) -> Sequence[ApiKeyView]:
        """List API keys: the role of each, and when and from where it was last used. No key itself is shown."""
        return await self._transport.get("/api/v1/keys", list[ApiKeyView])

    async def create(self, request: CreateApiKey | Mapping[str, Any]) -> NewApiKey:
        """Create an API key with a role, and show it once.

        The first key must be an administrator's, unless the daemon's settings have one. From then on clients over
        TCP need a key, also after a restart.
        """
        return decode(await self._transport.send(Request("POST", "/api/v1/keys", body=body_of(request))), NewApiKey)

    async def get(self, name: str) -> ApiKeyView:
        """Get an API key: its role, and when and from where it was last used."""
        return await self._transport.get(f"/api/v1/keys/{check_name(name, 'name')}", ApiKeyView)

    async def delete(self, name: str) -> None:
        """Delete an API key, and end its requests and streams.

        409 if it is the last administrator's key and the daemon's settings have none.
        """
        await self._transport.send(Request("DELETE", f"/api/v1/keys/{check_name(name, 'name')}"))

    async def rotate(self, name: str, request: RotateApiKey | Mapping[str, Any] | None = None) -> NewApiKey:
        """Replace an API key by a new one with the same name, role and project, and show it once.

        Without an overlap, the present key becomes invalid at once, and its requests and streams end.
        """
        return decode(
            await self._transport.send(
                Request(
                    "POST", f"/api/v1/keys/{check_name(name, 'name')}/rotate", body=body_of(request or RotateApiKey())
                )
            ),
            NewApiKey,
        )


class FleetOperations(Operations):
    async def get(self) -> FleetView:
        """Show the fleet, as seen by the host that answers."""
        return await self._transport.get("/api/v1/fleet", FleetView)

    async def leave(self, *, keep_vms: bool = False) -> None:
        """Remove the host that answers from its fleet. The fleet forgets the host and its objects, whose names become
        free.

        Its VMs keep running. Until `volantd` is restarted without the settings of the fleet, the host refuses
        requests that need the fleet's agreement, such as new VMs. `volar fleet leave` also removes these settings.

        :param keep_vms: keep its VMs, snapshots and volumes on this host
        """
        await self._transport.send(Request("POST", "/api/v1/fleet/leave", query={"keep_vms": flag(keep_vms)}))


class HostsOperations(Operations):
    async def list(self) -> Sequence[HostView]:
        """List the hosts of the fleet."""
        return await self._transport.get("/api/v1/hosts", list[HostView])

    async def get(self, name: str) -> HostView:
        """Get a host of the fleet."""
        return await self._transport.get(f"/api/v1/hosts/{check_name(name, 'name')}", HostView)

    async def drain(self, name: str, *, keep_vms: bool = False) -> HostView:
        """Give a host no new VMs, and move its VMs to other hosts, until `undrain`.

        Each VM is paused while it is copied, two at a time, and continues with memory and disk. VMs that can't move
        stay, and `moves` says why. The drain continues if the client disconnects or a daemon restarts.

        :param keep_vms: keep its VMs running on it
        """
        return decode(
            await self._transport.send(
                Request("POST", f"/api/v1/hosts/{check_name(name, 'name')}/drain", query={"keep_vms": flag(keep_vms)})
            ),
            HostView,
        )

    async def undrain(self, name: str) -> HostView:
        """Give a host new VMs again, and stop moving its VMs away. A VM that is being copied continues on its old
        host.
        """
        return decode(
            await self._transport.send(Request("POST", f"/api/v1/hosts/{check_name(name, 'name')}/undrain")), HostView
        )

    async def moves(self, name: str) -> HostMoves:
        """Show the moves of the VMs of a draining host: which wait, move or stay, and why."""
        return await self._transport.get(f"/api/v1/hosts/{check_name(name, 'name')}/moves", HostMoves)

    async def delete(self, name: str) -> None:
        """Remove a permanently lost host from the fleet. The names of its VMs become free.

        A reachable host can't be deleted. If a deleted host returns, it is a new host, with its VMs.
        """
        await self._transport.send(Request("DELETE", f"/api/v1/hosts/{check_name(name, 'name')}"))


class SystemOperations(Operations):
    async def status(self) -> SystemStatus:
        """Show figures of the daemon and its host."""
        return await self._transport.get("/api/v1/system/status", SystemStatus)

    async def drain(self, *, stop_vms: bool = False, grace_s: float | None = None) -> SystemStatus:
        """Prevent VMs from being created or started, for maintenance.

        Requests that would create or start a VM get 503, `urn:volant:error:draining`. Running VMs keep running. A
        VM waits if its restart policy is due, or if its host or guest has rebooted. Another drain keeps
        `draining_since`. The request returns before VMs have stopped: their events, or `GET
        /api/v1/vms/{name}?wait=stopped`, report that.

        :param stop_vms: stop running VMs, some at a time; they start again after `undrain`
        :param grace_s: with `stop_vms`: how long each guest may take to shut down; default `10s`, at most `10m`
        """
        return decode(
            await self._transport.send(
                Request("POST", "/api/v1/system/drain", query={"stop_vms": flag(stop_vms), "grace": duration(grace_s)})
            ),
            SystemStatus,
        )

    async def undrain(self) -> SystemStatus:
        """Allow VMs to start again; waiting VMs boot now."""
        return decode(await self._transport.send(Request("POST", "/api/v1/system/undrain")), SystemStatus)

    async def info(self) -> dict[str, Any]:
        """Show versions, addresses, and the accelerator with the reason for its choice."""
        return await self._transport.get("/api/v1/system/info", dict[str, Any])

    async def orphans(self) -> Sequence[OrphanView]:
        """List running hypervisors that no VM owns.

        The daemon never touches them. Adopt or kill them.
        """
        return await self._transport.get("/api/v1/system/orphans", list[OrphanView])

    async def adopt_orphan(self, tag: str, *, name: str | None = None) -> VmView:
        """Make a VM from an orphaned hypervisor, in the project of the request.

        Name, size and disk come from its command line; it has the plugin `base`, no labels and no restart policy.

        :param name: a name for the VM instead of its former one
        """
        return decode(
            await self._transport.send(
                Request("POST", f"/api/v1/system/orphans/{part(tag, 'tag')}/adopt", query={"name": name})
            ),
            VmView,
        )

    async def kill_orphan(self, tag: str) -> None:
        """Kill an orphaned hypervisor; its disk stays."""
        await self._transport.send(Request("POST", f"/api/v1/system/orphans/{part(tag, 'tag')}/kill"))

    async def tree(self) -> dict[str, Any]:
        """Show the supervisor tree."""
        return await self._transport.get("/api/v1/system/tree", dict[str, Any])

    async def df(self) -> Usage:
        """Show disk usage with its users, and how much a prune can free."""
        return await self._transport.get("/api/v1/system/df", Usage)

    async def prune(
        self,
        *,
        dry_run: bool = False,
        kinds: Collection[str] = (),
        unused_for_s: float | None = None,
        timeout_s: float = 330,
    ) -> Pruned:
        """Remove unused files.

        Files that a VM, a plugin, a snapshot or a process uses are kept, also if the use begins meanwhile. Disks
        without a VM, snapshots that are not in the database, and databases that a restore has replaced are removed
        only if you name their kind.

        :param dry_run: report what would be removed, without removing it
        :param kinds: kinds to remove; default `log`, `image`, `artifact`, `template`, `leftover`; `disk`,
            `snapshot` and `database` only if listed
        :param unused_for_s: only templates from which no VM was cloned for this time: `12h`
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
        """Create a ticket for a browser, which can't set headers on some streams.

        If the request names a project, the ticket is for that project, also for a path whose query belongs to a
        guest.
        """
        return decode(
            await self._transport.send(Request("POST", "/api/v1/tickets", body=body_of(WantTicket(path)))), Ticket
        )
