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
        self,
        request: RestoreVm | CreateVm | Mapping[str, Any],
        *,
        registry_auth: str | None = None,
        idempotency_key: str | None = None,
    ) -> VmView:
        """Create a VM; it is durable when this is answered.

        With `image`, the image's manifest and configuration are fetched before this is answered, and its layers as
        the VM boots; what the image's configuration says of the program, the body may replace.  With
        `from_snapshot` its first boot continues from that snapshot, as a copy with an identity of its own. Every
        later boot is an ordinary one, with the disk as it was left. If the first fails the VM is `crashed`; no cold
        boot follows.

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

    async def stats(self) -> Sequence[VmStats]:
        """Measure what each VM uses of the host: processor, memory, disks, network.

        The figures count from the start of the VM's process: two measurements give the use between them.
        """
        return await self._transport.get("/api/v1/stats/vms", list[VmStats])

    async def open_port(self, name: str, request: OpenPort | Mapping[str, Any]) -> PortOriginView:
        """Open a port of a VM at an origin of its own, where the scripts and cookies of its pages work.

        On loopback that is `{port}-{id}.localhost`; else it is below a name of `*.` in the daemon's
        `allowed_hosts`, and 409 without one, or if another host of the fleet has the VM. Where keys are in force,
        the link hands over a grant, which lasts as long as the credentials of this request, 12 hours at most.
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
        """List all snapshots, also those of deleted VMs, but for replicas: these belong to their VMs."""
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

        What this host has already is not fetched: chunks of its template and of other snapshots of the project, and
        what an earlier call has received. A client that leaves ends the transfer. The files that the snapshot
        relies on are matched by digest; an OCI image that this host lacks is fetched, and what can't be had is
        named in the error.

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
        """Send a snapshot to a registry, and wait until all of it is there.

        What the registry has already is not sent, such as chunks of other snapshots in the same repository. A
        client that leaves ends the transfer; the next one goes on. The snapshot contains the guest's memory, with
        what is secret in it.

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
        """List the snapshots that are on their way to or from a registry."""
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

        It also has those that are deleted, as long as events are kept. A VM that is no copy and was not copied is
        not in it.

        :param limit: at most so many nodes; default 100
        :param cursor: the `next_cursor` of the page before
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

        `boot` names files by URL, or by path. A path is one of the daemon's host: administrators may name those
        below a directory of the setting `artifact_dirs`, which are read when a VM boots. Otherwise it is 403
        `artifact-not-allowed`: send the file with `PUT /api/v1/artifacts/{sha256}`, then install the plugin. An OCI
        image in a file of the host has to be below `artifact_dirs`, too. A plugin of a fleet names no files: 422
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

    async def delete(self, name: str) -> None:
        """Delete a network that no VM is in."""
        await self._transport.send(Request("DELETE", f"/api/v1/networks/{check_name(name, 'name')}"))


class ImagesOperations(Operations):
    async def list(self, *, reference: str | None = None) -> Sequence[ImageView]:
        """List the OCI images in the cache.

        :param reference: only the one that this reference resolved to last
        """
        return await self._transport.get("/api/v1/images", list[ImageView], query={"reference": reference})

    async def pulls(self) -> Sequence[PullView]:
        """List the fetches of OCI images that are under way."""
        return await self._transport.get("/api/v1/images/pulls", list[PullView])

    async def pull(
        self, request: PullImage | Mapping[str, Any], *, registry_auth: str | None = None, timeout_s: float = 3600.0
    ) -> ImageView:
        """Fetch an OCI image, and wait until it is in the cache.

        A tag that the cache knows is not asked for again, unless `refresh` is set. If the client leaves, the fetch
        goes on for 10 minutes; another request for the same image waits for it.

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
        :param max_mb: only until all images take at most so many MiB; default 0
        :param unused_for_s: only images that were not used for so long: `12h`
        :param dry_run: say what would go, and remove nothing
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

        With a project, others that have it keep it.
        """
        await self._transport.send(Request("DELETE", f"/api/v1/images/{part(digest, 'digest')}"))


class VolumesOperations(Operations):
    async def list(self) -> Sequence[VolumeView]:
        """List volumes, which VMs mount."""
        return await self._transport.get("/api/v1/volumes", list[VolumeView])

    async def create(
        self, request: CreateVolume | Mapping[str, Any], *, idempotency_key: str | None = None, timeout_s: float = 150
    ) -> VolumeView:
        """Create a volume: an ext4 filesystem in a file of the host, which only takes the space that was written.

        VMs that are created with `name:/path` in `volumes` mount it there. It stays when they are deleted.

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
        """Grow a volume, and the filesystem in a VM that writes to it. It can't shrink."""
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

        Where the host's file system can, the copy takes no space until one of both is written to.

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
        """List secrets, which VMs get as environment variables or files. Their values are never shown."""
        return await self._transport.get("/api/v1/secrets", list[SecretView])

    async def get(self, name: str) -> SecretView:
        """Get what is known of a secret, and the VMs that refer to it. Its value is never shown."""
        return await self._transport.get(f"/api/v1/secrets/{check_name(name, 'name')}", SecretView)

    async def set(self, name: str, request: SetSecret | Mapping[str, Any]) -> SecretView:
        """Set the value of a secret, which is new or gets another one.

        It is stored encrypted. VMs that refer to it get the value with their next boot.
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

        A request that breaks off can be sent again.

        :param timeout_s: how long to wait for the answer
        """
        return decode(
            await self._transport.send(Request("POST", "/api/v1/system/secrets/reencrypt"), timeout_s=timeout_s),
            ReencryptedSecrets,
        )


class TemplatesOperations(Operations):
    async def list(self) -> Sequence[TemplateView]:
        """List the templates that new VMs are cloned from.

        With a project, those for plugins that it has.
        """
        return await self._transport.get("/api/v1/templates", list[TemplateView])

    async def build(
        self, request: BuildTemplate | Mapping[str, Any] | None = None, *, timeout_s: float = 600
    ) -> TemplateView:
        """Build the template of a kind of VM, and wait for it.

        One that is there is returned at once; one that is being built is waited for. A client that leaves cancels
        nothing. For the limits of the project a build counts as the creation of such a VM.

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
        """List projects: for an administrator all, for others their own."""
        return await self._transport.get("/api/v1/projects", list[ProjectView])

    async def create(
        self, request: CreateProject | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> ProjectView:
        """Create a project: a separate set of names, with limits.

        A key has one project. An administrator chooses with the header `Volant-Project`, or `project` in the query.
        """
        return decode(
            await self._transport.once("/api/v1/projects", key=idempotency_key, body=body_of(request)), ProjectView
        )

    async def get(self, name: str) -> ProjectView:
        """Get a project, with its limits and its use of them."""
        return await self._transport.get(f"/api/v1/projects/{check_name(name, 'name')}", ProjectView)

    async def set_quota(self, name: str, request: Quota | Mapping[str, Any] | None = None) -> ProjectView:
        """Replace the limits of a project; a member that is left out or null is no limit.

        VMs, disks and snapshots that already exceed a new limit stay. Further ones are refused: 409
        `quota-exceeded`; 429 for creates within a minute.
        """
        return decode(
            await self._transport.send(
                Request("PUT", f"/api/v1/projects/{check_name(name, 'name')}/quota", body=body_of(request or Quota()))
            ),
            ProjectView,
        )

    async def set_egress(self, name: str, request: SetEgress | Mapping[str, Any]) -> ProjectView:
        """Replace the egress policy of a project: what its VMs may connect to.

        New VMs that ask for no policy have this one. Those that ask for more get 409 `egress-not-allowed`, and so
        do forks and VMs from a snapshot whose original may connect to more. VMs that are there keep their policies.
        """
        return decode(
            await self._transport.send(
                Request("PUT", f"/api/v1/projects/{check_name(name, 'name')}/egress", body=body_of(request))
            ),
            ProjectView,
        )

    async def delete(self, name: str) -> None:
        """Delete an empty project that no key belongs to.

        This also deletes the logs of its deleted VMs and its names of images. A new project of the same name starts
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

        The first one has to be an administrator's, unless the daemon's settings name one: from then on clients over
        TCP need a key, also after a restart.
        """
        return decode(await self._transport.send(Request("POST", "/api/v1/keys", body=body_of(request))), NewApiKey)

    async def get(self, name: str) -> ApiKeyView:
        """Get an API key: its role, and when and from where it was last used."""
        return await self._transport.get(f"/api/v1/keys/{check_name(name, 'name')}", ApiKeyView)

    async def delete(self, name: str) -> None:
        """Delete an API key, and end its requests and streams.

        409: it is the last administrator's, and the daemon's settings name none.
        """
        await self._transport.send(Request("DELETE", f"/api/v1/keys/{check_name(name, 'name')}"))

    async def rotate(self, name: str, request: RotateApiKey | Mapping[str, Any] | None = None) -> NewApiKey:
        """Replace an API key by a new one of the same name, role and project, and show it once.

        The present key goes on for `overlap_s`. Without an overlap it ends at once, as do those before it.
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
        """Show the fleet, as the host that answers sees it."""
        return await self._transport.get("/api/v1/fleet", FleetView)

    async def leave(self, *, keep_vms: bool = False) -> None:
        """Take the host that answers out of its fleet. The fleet forgets it and what it has, whose names are free
        then.

        Its VMs run on. It refuses what the fleet had to agree on, such as new VMs, until `volantd` is restarted
        without the settings of the fleet. `volar fleet leave` removes these, too.

        :param keep_vms: keep its VMs, snapshots and volumes, as this host's alone
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
        """Let a host get no new VMs, and move those that it has to other hosts, until `undrain`.

        Each VM is paused while it is copied, two at a time, and goes on where it was, with memory and disk. VMs
        that can't move stay, and `moves` says why. The drain goes on without the client, and when a daemon is
        restarted.

        :param keep_vms: let the VMs that it has run on
        """
        return decode(
            await self._transport.send(
                Request("POST", f"/api/v1/hosts/{check_name(name, 'name')}/drain", query={"keep_vms": flag(keep_vms)})
            ),
            HostView,
        )

    async def undrain(self, name: str) -> HostView:
        """Let a host get new VMs again, and keep those that it has. A VM that is being copied goes on where it was."""
        return decode(
            await self._transport.send(Request("POST", f"/api/v1/hosts/{check_name(name, 'name')}/undrain")), HostView
        )

    async def moves(self, name: str) -> HostMoves:
        """Show what becomes of the VMs of a host that is being drained: which wait, move, or stay, and why."""
        return await self._transport.get(f"/api/v1/hosts/{check_name(name, 'name')}/moves", HostMoves)

    async def delete(self, name: str) -> None:
        """Forget a host that is gone for good. The names of its VMs are free then.

        A host that gives a sign of life can't be deleted. If one that was deleted comes back, it is a new host,
        with its VMs.
        """
        await self._transport.send(Request("DELETE", f"/api/v1/hosts/{check_name(name, 'name')}"))


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

    async def adopt_orphan(self, tag: str, *, name: str | None = None) -> VmView:
        """Make a VM of an orphaned hypervisor, in the project of the request.

        Name, size and disk are as its command line says; plugin `base`, no labels, no restart policy.

        :param name: instead of its own name
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
        :param kinds: only these; default `log`, `image`, `artifact`, `template`, `leftover`; `disk`, `snapshot`,
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
        """Create a ticket for a browser, which can't set headers on some streams.

        With a project, the ticket is for that one, also at a path whose query is a guest's.
        """
        return decode(
            await self._transport.send(Request("POST", "/api/v1/tickets", body=body_of(WantTicket(path)))), Ticket
        )
