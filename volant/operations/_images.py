"""Shared parts of the operations with OCI images: credentials, files of this host, errors, views."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from volant import oci
from volant.chunks import ChunkError
from volant.model import (
    CodedError,
    ImageHealthCheckView,
    ImageLayer,
    ImagePort,
    ImageView,
    Permission,
    Problem,
    PullView,
)
from volant.oci import OciError
from volant.transfer import TransferError

from ._context import Context

if TYPE_CHECKING:
    from volant.oci import CachedImage, ImageHealthCheck, ImageUser, Pull

REGISTRY_AUTH = b"volant-registry-auth"
"""The header with credentials for registries."""

_STATUS = {
    "bad_reference": (400, "invalid-image-reference"),
    "bad_credentials": (400, "invalid-registry-auth"),
    "image_unauthorized": (403, "image-unauthorized"),
    "image_rejected": (403, "image-rejected"),
    "registry_not_allowed": (403, "registry-not-allowed"),
    "image_not_found": (404, "image-not-found"),
    "image_in_use": (409, "image-in-use"),
    "image_changed": (409, "image-changed"),
    "image_mismatch": (422, "image-mismatch"),
    "platform_missing": (422, "platform-missing"),
    "image_unsupported": (422, "image-unsupported"),
    "image_invalid": (422, "image-invalid"),
    "image_too_large": (422, "image-too-large"),
    "timeout": (503, "image-timeout"),
    "cache_full": (507, "cache-full"),
    "registry_refused": (422, "registry-refused"),
    "snapshot_unsupported": (422, "snapshot-unsupported"),
    "snapshot_invalid": (422, "snapshot-invalid"),
    "snapshot_unfit": (422, "snapshot-unfit"),
    "snapshot_elsewhere": (409, "snapshot-elsewhere"),
    "snapshot_damaged": (409, "snapshot-damaged"),
    "base_missing": (409, "base-missing"),
    "base_mismatch": (409, "base-mismatch"),
    "description_invalid": (422, "snapshot-invalid"),
    "chunk_mismatch": (422, "chunk-mismatch"),
    "too_large": (422, "snapshot-too-large"),
    "disk_full": (507, "disk-full"),
}
"""Statuses and codes of problems. Other errors are 503, under their own names: a client can only retry or tell the
operator."""
_LOOKUP_S = 10.0
_RETRY_AFTER_S = {
    "registry_busy": 60,
    "registry_unreachable": 10,
    "too_many_fetches": 10,
    "too_many_transfers": 10,
    "images_stopped": 1,
}


@contextmanager
def image_problems(field: str | None = None) -> Iterator[None]:
    """Converts errors of images, transfers and chunks to Problems. `field` is the member of the body that names the
    object in a registry."""
    try:
        yield
    except (OciError, TransferError, ChunkError) as error:
        raise image_problem(error, field) from error


def image_problem(error: CodedError, field: str | None = None) -> Problem:
    """Returns the problem for an error."""
    status, code = _STATUS.get(error.code, (503, error.code.replace("_", "-")))
    return Problem(
        status, code, error.message, field=field, hint=error.hint or None, retry_after_s=_RETRY_AFTER_S.get(error.code)
    )


async def registry_auth(context: Context, secret: str | None) -> bytes | None:
    """Returns a request's credentials for registries, from its header or a secret, as the content of an auth file. They
    are for one fetch, and never stored, logged, or part of a text.

    :param secret: `registry_secret`, the name of a secret of the project
    :raises Problem: 400, they can't be parsed; 404, there is no such secret; 422, both are given; 503, the secret can't
        be decrypted
    """
    given = [value for name, value in context.scope["headers"] if name == REGISTRY_AUTH]
    if secret is not None:
        if given:
            raise Problem(
                422, "contradictory-request",
                "registry_secret names credentials for registries, and the header Volant-Registry-Auth has some",
                field="registry_secret", hint="leave one of them out",
            )  # fmt: skip
        value = await context.deps.vms.secrets.value(context.named(secret), field="registry_secret")
        with image_problems("registry_secret"):
            return oci.read_auth_file(value, secret=secret)
    if not given:
        return None
    if len(given) > 1:
        raise Problem(400, "invalid-registry-auth", "the header Volant-Registry-Auth is there more than once")
    with image_problems():
        return oci.read_auth(given[0].decode("latin-1"))


async def admit_image(context: Context, reference: str, field: str = "reference") -> None:
    """Checks that a client may name an image. It may name a file of this host only below `artifact_dirs`.

    :raises Problem: 400, it is no reference; 403, the client may not name that file
    """
    with image_problems(field):
        found = oci.parse_reference(reference)
        if found.registry:
            await _admit_registry(context, reference, found.registry, field)
            return
    # skopeo follows links, and reads with the rights of the daemon.
    path = await trio.to_thread.run_sync(os.path.realpath, found.name)
    if may_name(context, Path(found.name)) and may_name(context, Path(path)):
        return
    raise Problem(
        403, "image-not-allowed", f"{field} is a file of the daemon's host, and this client may not name it",
        field=field, hint="upload it with `volar images load`, or put it below a directory of artifact_dirs",
    )  # fmt: skip


def may_name(context: Context, path: Path) -> bool:
    """Returns whether a caller may name a file of this host: an administrator below `artifact_dirs`. Such files belong
    to no project."""
    return context.caller.may(Permission.ADMIN) and context.deps.vms.artifacts.may_read(path)


async def _admit_registry(context: Context, reference: str, registry: str, field: str) -> None:
    """Checks that a caller may contact a registry. Administrators may contact any registry, others only refer to images
    in their project's cache. Otherwise they could probe the host's network for services.

    :raises Problem: 403
    """
    if context.caller.may(Permission.ADMIN) or await context.deps.oci.get(reference, context.project) is not None:
        return
    host, _, port = registry.rpartition(":") if registry.rpartition(":")[2].isdecimal() else (registry, "", "443")
    with trio.move_on_after(_LOOKUP_S):
        if await context.deps.vms.artifacts.may_connect(host.strip("[]"), int(port)):
            return
    raise Problem(
        403, "registry-not-allowed", f"{registry} has no public address, and only an administrator may name it",
        field=field, hint="an administrator can allow its network in artifact_allow_cidr",
    )  # fmt: skip


def image_view(image: CachedImage, users: Mapping[str, Sequence[ImageUser]], project: str | None) -> ImageView:
    """Returns the view of an image for clients of a project; None for all projects."""
    config = image.config
    return ImageView(
        digest=image.digest,
        references=image.names,
        platform=str(config.platform),
        size_bytes=image.size_bytes,
        own_bytes=image.own_bytes,
        layers=tuple(map(ImageLayer, config.diff_ids, image.layer_bytes)),
        created_at=config.created_at,
        used_at=datetime.fromtimestamp(image.used_at, UTC),
        used_by=tuple(user.what for user in users.get(image.digest, ()) if project in (None, user.project)),
        entrypoint=config.entrypoint,
        command=config.cmd,
        env=dict(config.env),
        user=config.user,
        workdir=config.working_dir,
        exposed_ports=tuple(ImagePort(port.number, port.protocol) for port in config.exposed_ports),
        stop_signal=config.stop_signal,
        labels=dict(config.labels),
        volumes=config.volumes,
        health_check=None if config.health_check is None else _health_check(config.health_check),
    )


def pull_view(pull: Pull) -> PullView:
    """Returns the view of a fetch."""
    report = pull.report
    return PullView(
        reference=pull.reference,
        digest=pull.digest,
        phase=report.phase,
        layers_done=report.layers_done,
        layers_total=report.layers_total,
        done_bytes=report.done_bytes,
        total_bytes=report.total_bytes,
        bytes_per_s=round(report.bytes_per_s, 1),
        waiting=pull.waiting,
    )


def _health_check(found: ImageHealthCheck) -> ImageHealthCheckView:
    return ImageHealthCheckView(
        command=found.command,
        shell=found.shell,
        interval_s=found.interval_s,
        timeout_s=found.timeout_s,
        start_period_s=found.start_period_s,
        retries=found.retries,
    )
