"""Makes the first row of a VM from a request."""

from __future__ import annotations

from datetime import datetime, timedelta

from ._manifest import BASE, Manifest, check_env
from ._network import NONE, Networking, chosen_network, parse_ports
from ._problem import contradictory, invalid
from ._row import CreateVm, VmRow
from ._text import check_labels, check_name, check_plain, parse_duration

_MAX_TTL_S = 366 * 86400.0
_NO_NETWORKING = Networking()


DEFAULT_MEMORY_MB = 256
"""For VMs of `base`. The minimum of its image is little to work with."""


def size_of(request: CreateVm, manifest: Manifest) -> tuple[int, int]:
    """Returns the CPU cores and the MiB of memory: those of the request, else of the plugin."""
    needs = manifest.resources
    memory_mb = DEFAULT_MEMORY_MB if manifest.name == BASE.name else needs.memory_mb
    return request.cpu_cores or needs.cpu_cores, request.memory_mb or memory_mb


def new_row(
    request: CreateVm, manifest: Manifest, *, vm_id: int, now: datetime, networking: Networking = _NO_NETWORKING
) -> VmRow:
    """Returns the row of a new VM, with the status `pending` and without a lease.

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
    has_disk = manifest.boot is not None and manifest.boot.rootfs is not None
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
    return VmRow(
        id=vm_id,
        name=request.name,
        cpu_cores=cpu_cores,
        memory_mb=memory_mb,
        plugin=request.plugin,
        runtime=request.runtime if request.runtime is not None else manifest.runtime,
        manifest=manifest,
        kernel_cmdline=request.kernel_cmdline,
        labels=labels,
        env=request.env,
        restart_policy=request.restart_policy,
        boot=request.boot,
        created_at=now,
        updated_at=now,
        expires_at=None if ttl is None else now + ttl,
        network=choice.network,
        network_reason=choice.reason,
        network_fallback=choice.fallback,
        ports=ports,
        layer=f"{vm_id}-{now:%Y%m%dT%H%M%S.%f}" if has_disk else "",
        disk_mb=request.disk_mb,
    )


def parse_ttl(ttl: str | None) -> timedelta | None:
    """:raises Problem: 400, it is malformed, or too short or long."""
    if ttl is None:
        return None
    return timedelta(seconds=parse_duration(ttl, "ttl", minimum_s=1, maximum_s=_MAX_TTL_S))


def check_create(request: CreateVm) -> None:
    """Checks what the types of `CreateVm` can't say. :raises Problem: 400 that names the field."""
    check_name(request.name, "name")
    check_name(request.plugin, "plugin")
    if request.runtime is not None:
        check_name(request.runtime, "runtime")
    check_plain(request.kernel_cmdline, "kernel_cmdline", maximum=1024)
    check_labels(request.labels)
    check_env(request.env, "env")
    if request.network is not None:
        check_name(request.network, "network")
    parse_ports(request.ports)
    parse_ttl(request.ttl)
