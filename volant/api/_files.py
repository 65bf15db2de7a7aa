"""Bodies that are files: uploads of artifacts and images, and downloads of backups.

`PUT /api/v1/artifacts/{sha256}`, `PUT /api/v1/images/archive` and `POST /api/v1/system/backup`.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from volant.http import Call, Limits, Nothing, StreamRoute, read_call_body, receive_into
from volant.images import ImageError
from volant.model import ArtifactView, Problem, invalid
from volant.operations import ApiDeps, image_problems, image_view, require_project

BACKUP = "application/vnd.sqlite3"
_ARTIFACT_STATUS = {"artifact_too_large": 413, "artifact_mismatch": 400, "timeout": 408, "cache_full": 507}
"""Statuses of what a client can do something about; all others are 503."""
_MAX_NAME = 4096
"""Maximum length of an image's reference, in characters."""


def routes(deps: ApiDeps, limits: Limits) -> list[StreamRoute]:
    """Returns the routes of these resources."""

    async def put_artifact(call: Call) -> None:
        call.query(credentials=False).done()
        (digest,) = call.args
        await deps.recorder.begin()
        with _artifact_problems():
            async with deps.vms.artifacts.receiving(digest, call.project) as upload:
                await receive_into(call, upload)
                artifact = await upload.finish()
        await _created(call, ArtifactView(sha256=artifact.digest, size_bytes=artifact.size_bytes))

    async def put_image(call: Call) -> None:
        query = call.query(credentials=False)
        name = query.text("reference")
        query.done()
        if not name or len(name) > _MAX_NAME:
            raise invalid("reference", "the parameter reference is missing or too long", hint="write a name with a tag")
        await deps.recorder.begin(detail=name)
        require_project(deps, call.project)
        with image_problems("reference"):
            async with deps.oci.receiving(call.project) as upload:
                await receive_into(call, upload)
                image = await deps.oci.load(upload, name, call.project)
            image = await deps.oci.find(image.digest, call.project) or image
        await _created(call, image_view(image, deps.oci.users(), call.project))

    async def backup(call: Call) -> None:
        call.query(credentials=False).done()
        await read_call_body(call, Nothing, limits)
        async with deps.backups.take() as taken:

            async def send() -> None:
                await call.start(
                    200,
                    [
                        (b"content-type", BACKUP.encode()),
                        (b"content-length", b"%d" % taken.size),
                        (b"content-disposition", b'attachment; filename="%s"' % taken.name.encode()),
                        (b"repr-digest", b"sha-256=:%s:" % b64encode(taken.sha256)),
                        (b"cache-control", b"no-store"),
                    ],
                )
                while data := await taken.read():
                    await call.write(data)
                await call.finish()

            await call.while_connected(send)

    return [
        StreamRoute(re.compile(r"/api/v1/artifacts/([0-9a-f]{64})\Z"), put_artifact, methods=frozenset({"PUT"})),
        StreamRoute(re.compile(r"/api/v1/images/archive/?\Z"), put_image, methods=frozenset({"PUT"})),
        StreamRoute(re.compile(r"/api/v1/system/backup\Z"), backup, methods=frozenset({"POST"})),
    ]


async def _created(call: Call, view: msgspec.Struct) -> None:
    body = msgspec.json.encode(view)
    fields = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    await call.reject(201, fields, body)


@contextmanager
def _artifact_problems() -> Iterator[None]:
    """:raises Problem: instead of ImageError"""
    try:
        yield
    except ImageError as error:
        status = _ARTIFACT_STATUS.get(error.code, 503)
        raise Problem(status, error.code.replace("_", "-"), error.message, hint=error.hint or None) from error
