"""Creates the first row of a VM from a request."""

from __future__ import annotations

from datetime import datetime, timedelta

from ._egress import EGRESS_ALL, Egress, choose_egress, parse_egress
from ._manifest import BASE, Manifest, check_env
from ._mounts import parse_mounts
from ._network import NONE, Networking, chosen_network, parse_ports
from ._problem import contradictory, invalid
from ._project import DEFAULT_PROJECT
from ._row import CreateVm, Movable, Replicate, VmRow
from ._secret import check_secrets, parse_secrets, split_env
from ._text import check_labels, check_name, check_plain, parse_duration

_MAX_TTL_S = 366 * 86400.0
_MIN_REPLICATE_S, _MAX_REPLICATE_S = 10.0, 86400.0
"""The lower limit exists because each replica pauses the guest briefly and reads all of its memory."""
_NO_NETWORKING = Networking()


DEFAULT_MEMORY_MB = 256
"""The default for VMs of `base`. The minimum of its image leaves little for programs."""
IMAGE_MEMORY_MB = 512
"""The default for VMs of an OCI image."""
IMAGE_DISK_MB = 10 * 1024
"""The default for VMs of an OCI image. The disk only takes up the space that is written."""
_FILES_OF_ONE_HOST = ("oci:", "oci-archive:", "docker-archive:")
_ONLY_FOR_IMAGES = (
    "registry_secret",
    "command",
    "entrypoint",
    "user",
    "workdir",
    "stop_signal",
    "health_check",
    "publish_all",
    "attach",
)


def size_of(request: CreateVm, manifest: Manifest) -> tuple[int, int]:
    """Returns the CPU cores and the MiB of memory, from the request, otherwise from the plugin."""
    needs = manifest.resources
    memory_mb = needs.memory_mb
    if manifest.name == BASE.name:
        memory_mb = DEFAULT_MEMORY_MB if request.image is None else IMAGE_MEMORY_MB
    return request.cpu_cores or needs.cpu_cores, request.memory_mb or memory_mb


def new_row(
    request: CreateVm,
    manifest: Manifest,
    *,
    project: str = DEFAULT_PROJECT,
    project_egress: Egress = EGRESS_ALL,
    vm_id: int,
    now: datetime,
    networking: Networking = _NO_NETWORKING,
    movable: Movable | None = None,
) -> VmRow:
    """Returns the row of a new VM, with the status `pending`, without a lease and without the ids of its volumes.

    :raises Problem: 400 that names the field.
    """
    check_create(request)
    cpu_cores, memory_mb = size_of(request, manifest)
    if memory_mb < manifest.resources.memory_mb and manifest.name != BASE.name:
        raise invalid(
            "memory_mb",
            f"memory_mb {memory_mb} is too little for plugin {manifest.name!r}, "
            f"which needs at least {manifest.resources.memory_mb}",
        )
    labels = {**manifest.labels, **request.labels}
    check_labels(labels)
    has_disk = manifest.boot is not None and manifest.boot.has_disk
    disk_mb = request.disk_mb or (None if manifest.image is None else IMAGE_DISK_MB)
    if request.disk_mb is not None and not has_disk:
        raise contradictory(
            "disk_mb",
            f"disk_mb is {request.disk_mb}, and plugin {manifest.name!r} has no root filesystem to be on a disk",
            hint="leave it out; the root filesystem of such a VM is in its memory",
        )
    choice = chosen_network(request.network, networking.default)
    ports = parse_ports(request.ports)
    if ports and choice.network == NONE:
        raise contradictory(
            "ports",
            f"ports is {[*map(str, ports)]}, and the VM has no network ({choice.reason})",
            hint="set `network` to `bridge`, `user`, or the name of a network",
        )
    ttl = parse_ttl(request.ttl)
    expires_at = None if ttl is None else now + ttl
    if movable is not None:
        # It may be as old as it was on the host before.
        expires_at = movable.expires_at
    mounts = parse_mounts(request.volumes)
    env, secret_env = split_env(request.env)
    return VmRow(
        id=vm_id,
        name=request.name,
        project=project,
        cpu_cores=cpu_cores,
        memory_mb=memory_mb,
        plugin=request.plugin,
        runtime=request.runtime if request.runtime is not None else manifest.runtime,
        manifest=manifest,
        start_workload=request.start_workload,
        attach=request.attach,
        kernel_cmdline=request.kernel_cmdline,
        labels=labels,
        env=env,
        secret_env=secret_env,
        secrets=parse_secrets(request.secrets),
        registry_secret=request.registry_secret,
        restart_policy=request.restart_policy,
        boot=request.boot,
        created_at=now,
        updated_at=now,
        expires_at=expires_at,
        network=choice.network,
        network_reason=choice.reason,
        network_fallback=choice.fallback,
        ports=ports,
        egress=choose_egress(
            request.egress, project=project_egress, connected=choice.network != NONE, reason=choice.reason
        ),
        layer=f"{vm_id}-{now:%Y%m%dT%H%M%S.%f}" if has_disk else "",
        disk_mb=disk_mb,
        volumes=mounts.volumes,
        directories=mounts.directories,
        disk_iops=request.disk_iops,
        disk_mbps=request.disk_mbps,
        movable=movable,
        placement=request.placement,
    )


def _check_image(request: CreateVm) -> None:
    if request.image is not None:
        check_plain(request.image, "image")
        if request.plugin != BASE.name:
            raise contradictory(
                "image", f"image is {request.image!r} and plugin {request.plugin!r}: a VM has one of them",
                hint="leave one out",
            )  # fmt: skip
        if request.attach and not request.start_workload:
            raise contradictory(
                "attach", "attach is true and start_workload false: there is no program to attach to",
                hint="leave one out",
            )  # fmt: skip
        return
    given = [name for name in _ONLY_FOR_IMAGES if getattr(request, name) not in (None, False)]
    if not request.start_workload:
        given.append("start_workload")
    if request.on_exit != "stop":
        given.append("on_exit")
    if given:
        raise contradictory(
            given[0], f"{given[0]} is only for a VM of an OCI image",
            hint="name the image in `image`, or leave it out",
        )  # fmt: skip


def _check_failover(request: CreateVm) -> None:
    if request.replicate is not None:
        replicate_every_s(request.replicate)
        if request.failover != "restore":
            raise contradictory(
                "replicate", f"replicate is given, and failover is {request.failover!r}, which uses no replica",
                hint="set `failover` to `restore`, or leave `replicate` out",
            )  # fmt: skip
    elif request.failover == "restore":
        raise invalid(
            "replicate", "failover is 'restore', and replicate does not say how often to copy the VM to other hosts",
            hint='write for instance "replicate": {"every": "5m"}',
        )  # fmt: skip
    if request.failover == "never":
        return
    what = None
    if request.volumes:
        what = f"volumes is {[*request.volumes]}"
    elif request.image is not None and request.image.startswith(_FILES_OF_ONE_HOST):
        what = f"image is {request.image!r}"
    if what is not None:
        raise contradictory(
            "failover", f"failover is {request.failover!r}, and {what}, which only one host has",
            hint="leave `failover` out, or put the image into a registry",
        )  # fmt: skip


def replicate_every_s(replicate: Replicate) -> float:
    """Returns the seconds between two replicas. :raises Problem: 400, malformed, too short or too long."""
    return parse_duration(
        replicate.every, "replicate.every", minimum_s=_MIN_REPLICATE_S, maximum_s=_MAX_REPLICATE_S
    )  # fmt: skip


def parse_ttl(ttl: str | None) -> timedelta | None:
    """Parses a `ttl`. :raises Problem: 400, it is malformed, too short or too long."""
    if ttl is None:
        return None
    return timedelta(seconds=parse_duration(ttl, "ttl", minimum_s=1, maximum_s=_MAX_TTL_S))


def check_create(request: CreateVm) -> None:
    """Checks the rules that the types of `CreateVm` can't express. :raises Problem: 400 that names the field."""
    check_name(request.name, "name")
    check_name(request.plugin, "plugin")
    _check_image(request)
    _check_failover(request)
    if request.placement is not None:
        for name in ("labels", "affinity", "anti_affinity"):
            check_labels(getattr(request.placement, name), f"placement.{name}")
    if request.runtime is not None:
        check_name(request.runtime, "runtime")
    check_plain(request.kernel_cmdline, "kernel_cmdline", maximum=1024)
    check_labels(request.labels)
    check_env(request.env, "env")
    if request.network is not None:
        check_name(request.network, "network")
    parse_ports(request.ports)
    if request.egress is not None:
        parse_egress(request.egress)
    mounts = parse_mounts(request.volumes)
    secret_env = split_env(request.env)[1]
    check_secrets(secret_env, parse_secrets(request.secrets), (*mounts.volumes, *mounts.directories))
    if request.volumes and request.boot == "template":
        raise invalid(
            "boot", "boot is 'template', and a template has no volumes", hint="leave `boot` out: the VM boots cold"
        )
    parse_ttl(request.ttl)
