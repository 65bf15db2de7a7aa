"""Makes the manifest of a VM from an OCI image and a request, so that the VM runs what a container of that image would
run.

Docker's rules: a request's entrypoint drops the image's command; variables of the request come after the image's; an
empty user is root, and an empty working directory is `/`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from volant.journal import Projection
from volant.model import (
    BASE,
    Boot,
    CreateVm,
    ExecDefaults,
    HealthCheck,
    Manifest,
    OciImage,
    Problem,
    Workload,
    check_manifest,
    invalid,
    parse_ports,
)
from volant.oci import ImageUser


def image_users(projection: Projection) -> dict[str, list[ImageUser]]:
    """Returns the users of images, by the images' digests."""
    found: dict[str, list[ImageUser]] = {}
    named = [
        *((ImageUser(row.project, f"VM {row.name}"), row.manifest) for row in projection.rows()),
        *((ImageUser(one.project, f"snapshot {one.name}"), one.vm.manifest) for one in projection.snapshots.values()),
    ]
    for user, manifest in named:
        if manifest.image is not None:
            found.setdefault(manifest.image.digest, []).append(user)
    return found


if TYPE_CHECKING:
    from volant.oci import ImageConfig, ImageHealthCheck, Resolved

_CHECK_S = 30.0
_RETRIES = 3
"""Docker's defaults for health checks."""
_MIN_INTERVAL_S, _MAX_INTERVAL_S = 0.1, 3600.0
_MAX_TIMEOUT_S = 600.0
_MAX_RETRIES = 100
_PUBLISHED = range(49152, 65536)
"""The ports of the host to choose from: those that nobody may register (RFC 6335)."""
_MAX_LABELS = 32
_MAX_KEY, _MAX_VALUE = 128, 1024


def image_manifest(request: CreateVm, image: Resolved) -> Manifest:
    """Returns the manifest of a VM of an image.

    :raises Problem: 400, there is nothing to run, or the request or the image breaks a rule of manifests
    """
    config = image.config
    program = _program(request, config)
    if not program and request.start_workload:
        raise invalid(
            "command", f"the image {image.reference} names no program, and neither does the request",
            hint="give the program in `command`",
        )  # fmt: skip
    workdir = request.workdir or config.working_dir or "/"
    user = request.user or config.user or None
    env = dict(config.env)
    workload = Workload(
        entrypoint=program,
        env=env,
        workdir=workdir,
        user=user,
        stop_signal=request.stop_signal or config.stop_signal or "SIGTERM",
        restart="never",
        on_exit=request.on_exit,
        health_check=_health_check(request, config),
    )
    manifest = msgspec.structs.replace(
        BASE,
        boot=Boot(image=OciImage(reference=image.reference, digest=image.digest)),
        workload=workload if program else None,
        exec=ExecDefaults(env=env, workdir=workdir, user=user),
        directories=config.volumes,
        labels=_labels(config),
    )
    try:
        return check_manifest(manifest)
    except Problem as problem:
        raise invalid(
            "image", f"a VM can't be made of the image {image.reference}: {problem.detail}", hint=problem.hint
        ) from problem


def with_exposed_ports(request: CreateVm, image: Resolved, taken: Collection[int], start: int) -> CreateVm:
    """Returns the request with a free port of the host for each port that the image exposes and that is not published
    yet.

    :param taken: ports of the host that lead to VMs
    :param start: a number by which requests at the same time choose other ports
    :raises Problem: 400, the ports of the request are malformed; 503, no port is free
    """
    published = {(port.guest_port, port.protocol) for port in parse_ports(request.ports)}
    used = {*taken, *(port.host_port for port in parse_ports(request.ports))}
    ports = list(request.ports)
    free = (port for at in range(len(_PUBLISHED)) if (port := _PUBLISHED[(start + at) % len(_PUBLISHED)]) not in used)
    for exposed in image.config.exposed_ports:
        if exposed.protocol not in ("tcp", "udp") or (exposed.number, exposed.protocol) in published:
            continue
        host_port = next(free, None)
        if host_port is None:
            raise Problem(
                503, "no-capacity", "no port of the host is free for a port that the image exposes",
                field="publish_all", hint="delete a VM, or publish the ports that you need with `ports`",
            )  # fmt: skip
        ports.append(f"{host_port}:{exposed.number}/{exposed.protocol}")
    return msgspec.structs.replace(request, ports=tuple(ports))


def _program(request: CreateVm, config: ImageConfig) -> tuple[str, ...]:
    arguments = request.command
    if request.entrypoint is not None:
        return (*request.entrypoint, *(arguments or ()))
    return (*config.entrypoint, *(config.cmd if arguments is None else arguments))


def _health_check(request: CreateVm, config: ImageConfig) -> HealthCheck | None:
    if request.health_check == "none":
        return None
    if request.health_check is not None:
        return request.health_check
    return None if config.health_check is None else _of_image(config.health_check)


def _of_image(check: ImageHealthCheck) -> HealthCheck:
    command = ("/bin/sh", "-c", *check.command) if check.shell else check.command
    return HealthCheck(
        command=command,
        interval_s=min(max(check.interval_s or _CHECK_S, _MIN_INTERVAL_S), _MAX_INTERVAL_S),
        timeout_s=min(max(check.timeout_s or _CHECK_S, _MIN_INTERVAL_S), _MAX_TIMEOUT_S),
        retries=min(check.retries or _RETRIES, _MAX_RETRIES),
        start_period_s=min(check.start_period_s, _MAX_INTERVAL_S),
    )


def _labels(config: ImageConfig) -> dict[str, str]:
    """Returns the labels of an image that a VM can have; build tools write longer ones, too."""
    fitting = {
        key: value
        for key, value in config.labels
        if 0 < len(key) <= _MAX_KEY and "=" not in key and len(value) <= _MAX_VALUE
        if not any(ord(character) < 32 or ord(character) == 127 for character in key + value)
    }
    return dict(list(fitting.items())[:_MAX_LABELS])


def image_at(disk: Path) -> OciImage:
    """Returns the image of a disk in the cache. Its reference is not known there."""
    digest = f"sha256:{disk.parent.name}"
    return OciImage(reference=digest, digest=digest)
