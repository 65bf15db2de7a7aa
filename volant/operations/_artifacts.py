"""Which files of this host a manifest may name.

The daemon can read files that its clients can't. So a path counts only for administrators, as files of the host belong
to no project, and of those only

- below a directory that the operator has named (`artifact_dirs`);
- for a client whose user is known: at a Unix socket, or over loopback without a key the daemon's own user. It is read
  at once, and with the rights of that user.

Every other client sends the file. A proxy hides its clients, so a request that a proxy has passed on has no user.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from volant import images, oci
from volant.host import Credentials, loopback_peer_uid
from volant.images import ArtifactCache, ImageError
from volant.model import Artifact, Manifest, Permission, Problem

from ._context import Context

_FORWARDED = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-real-ip"})
_STATUS = {
    "artifact_too_large": 413,
    "artifact_missing": 400,
    "artifact_mismatch": 400,
    "timeout": 408,
    "cache_full": 507,
}
"""Of what a client can do something about; the rest is 503."""


def check_every_host_has(manifest: Manifest) -> None:
    """Checks that a manifest names nothing that only this host has. :raises Problem: 422 a file"""
    boot = manifest.boot
    named: dict[str, bool] = {}
    for name in ("kernel", "initramfs", "rootfs"):
        artifact: Artifact | None = getattr(boot, name, None)
        named[f"boot.{name}.url"] = artifact is not None and images.local_path(artifact.url) is not None
    if manifest.image is not None:
        with suppress(oci.OciError):
            named["boot.image.reference"] = not oci.parse_reference(manifest.image.reference).registry
    for field, is_file in named.items():
        if is_file:
            raise Problem(
                422, "file-of-one-host", f"{field} is a file of this host, and all hosts of the fleet have the plugin",
                field=field, hint="serve the file over HTTPS, or push the image to a registry",
            )  # fmt: skip


async def admit(context: Context, manifest: Manifest) -> None:
    """Let a manifest name what it names: files of this host that only its client may read are in the cache then.

    :raises Problem: 403 the client may not name a file of this host; 400 there is no such file for it; 408, 413, 503,
        507 it could not be taken
    """
    if manifest.boot is None:
        return
    artifacts: ArtifactCache = context.deps.vms.artifacts
    for name in ("kernel", "initramfs", "rootfs"):
        artifact: Artifact | None = getattr(manifest.boot, name)
        path = None if artifact is None else images.local_path(artifact.url)
        if artifact is None or path is None or may_name(context, path) or await artifacts.has(artifact):
            continue
        field = f"boot.{name}.url"
        credentials = client_credentials(context)
        if credentials is None:
            raise Problem(
                403, "artifact-not-allowed", f"{field} is a path of the daemon's host, and this client may name none",
                field=field,
                hint="upload the file with `volar plugins upload`, or let it lie below a directory of artifact_dirs",
            )  # fmt: skip
        with artifact_problems(field):
            await artifacts.take(artifact, credentials)


def may_name(context: Context, path: Path) -> bool:
    """Whether a caller may name a file below a directory that the operator has named."""
    return context.caller.may(Permission.ADMIN) and context.deps.vms.artifacts.may_read(path)


def client_credentials(context: Context) -> Credentials | None:
    """The user of this host that asks; None: unknown, or without meaning."""
    scope, access = context.scope, context.deps.access
    if not context.caller.may(Permission.ADMIN):
        return None
    if any(name in _FORWARDED for name, _ in scope["headers"]):
        return None
    if scope["state"].get("unix"):
        found: Credentials | None = scope["state"]["credentials"]
        return found
    if access.asks_for_key or not scope.get("client") or not scope.get("server"):
        return None
    uid = loopback_peer_uid(scope["client"], scope["server"])
    return Credentials.own() if uid == os.geteuid() else None


@contextmanager
def artifact_problems(field: str | None) -> Iterator[None]:
    """:raises Problem: instead of ImageError; `field` names the member of the manifest."""
    try:
        yield
    except ImageError as error:
        status = _STATUS.get(error.code, 503)
        names = {"artifact_missing": "artifact-unavailable", "artifact_mismatch": "artifact-mismatch"}
        code = names.get(error.code) or error.code.replace("_", "-")
        raise Problem(
            status, code, error.message if field is None else f"{field}: {error.message}",
            field=field, hint=error.hint or None,
        ) from error  # fmt: skip
