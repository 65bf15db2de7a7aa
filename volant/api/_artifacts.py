"""`PUT /api/v1/artifacts/{sha256}`: files that VMs boot from, sent by a client."""

from __future__ import annotations

import re

import msgspec

from volant.http import Call, StreamRoute, receive_into
from volant.model import ArtifactView
from volant.operations import ApiDeps, artifact_problems


def routes(deps: ApiDeps) -> list[StreamRoute]:
    """The routes of this resource."""

    async def put(call: Call) -> None:
        call.query(credentials=False).done()
        (digest,) = call.args
        await deps.recorder.begin()
        with artifact_problems(None):
            async with deps.vms.artifacts.receiving(digest, call.project) as upload:
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
