"""`/api/v1/artifacts`: files that VMs boot from, sent by a client; and which of this host's files a client may name.

A manifest may name a file of this host. The daemon can read files that its clients can't. So a path counts only

- below a directory that the operator has named (`artifact_dirs`), whoever asks;
- for a client whose user is known: at a Unix socket, or over loopback without a key the daemon's own user. It is read
  at once, and with the rights of that user.

Everybody else sends the file. What stands behind a proxy is not who asks, so a request that a proxy has passed on has
no user.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import trio

from volant import images
from volant.host import Reader, loopback_peer_uid
from volant.http import Access, Call, StreamRoute, receive_into
from volant.images import ArtifactCache, ImageError
from volant.model import Artifact, ArtifactView, Manifest, Problem
from volant.operations import ApiDeps

_FORWARDED = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-real-ip"})
_STATUS = {
    "media_too_large": 413,
    "media_missing": 400,
    "media_mismatch": 400,
    "timeout": 408,
    "cache_full": 507,
}
"""Of what a client can do something about; the rest is 503."""


def routes(deps: ApiDeps) -> list[StreamRoute]:
    """The routes of this resource."""

    async def put(call: Call) -> None:
        call.query(credentials=False).done()
        (digest,) = call.args
        with _told(None):
            async with deps.vms.doors.artifacts.receiving(digest) as upload:
                await receive_into(call, upload)
                artifact = await upload.finish()
        body = msgspec.json.encode(ArtifactView(sha256=artifact.digest, size_bytes=artifact.size_bytes))
        fields = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
        ]
        await call.reject(201, fields, body)

    return [StreamRoute(re.compile(r"/api/v1/artifacts/([0-9a-f]{64})\Z"), put, methods=frozenset({"PUT"}))]


async def admit(deps: ApiDeps, access: Access, scope: Any, manifest: Manifest) -> None:
    """Let a manifest name what it names: files of this host that only its client may read are in the cache then.

    :raises Problem: 403 the client may not name a file of this host; 400 there is no such file for it; 408, 413, 503,
        507 it could not be taken
    """
    if manifest.boot is None:
        return
    artifacts: ArtifactCache = deps.vms.doors.artifacts
    for name in ("kernel", "initramfs", "rootfs"):
        artifact: Artifact | None = getattr(manifest.boot, name)
        path = None if artifact is None else images.local_path(artifact.url)
        if artifact is None or path is None or artifacts.may_read(path) or await artifacts.has(artifact):
            continue
        field = f"boot.{name}.url"
        reader = await _reader(scope, access)
        if reader is None:
            raise Problem(
                403, "artifact-not-allowed", f"{field} is a path of the daemon's host, and this client may name none",
                field=field,
                hint="upload the file with `volar plugins upload`, or let it lie below a directory of artifact_dirs",
            )  # fmt: skip
        with _told(field):
            await artifacts.take(artifact, reader)


async def _reader(scope: Any, access: Access) -> Reader | None:
    """The user of this host that asks; None: nobody knows, or it does not count."""
    if any(name in _FORWARDED for name, _ in scope["headers"]):
        return None
    if scope["state"].get("unix"):
        found: Reader | None = scope["state"]["reader"]
        return found
    if access.asks_for_key or not scope.get("client") or not scope.get("server"):
        return None
    uid = await trio.to_thread.run_sync(loopback_peer_uid, scope["client"], scope["server"])
    return Reader.own() if uid == os.geteuid() else None


@contextmanager
def _told(field: str | None) -> Iterator[None]:
    """What goes wrong with a file becomes an answer."""
    try:
        yield
    except ImageError as error:
        status = _STATUS.get(error.code, 503)
        names = {"media_missing": "artifact-unavailable", "media_mismatch": "artifact-mismatch"}
        code = names.get(error.code) or error.code.replace("_", "-")
        raise Problem(
            status, code, error.message if field is None else f"{field}: {error.message}",
            field=field, hint=error.hint or None,
        ) from error  # fmt: skip
