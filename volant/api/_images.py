"""`PUT /api/v1/images/archive`: an OCI image in an archive, sent by a client."""

from __future__ import annotations

import re

import msgspec

from volant.http import Call, StreamRoute, receive_into
from volant.model import invalid
from volant.operations import ApiDeps, image_problems, image_view, require_project

_PATH = re.compile(r"/api/v1/images/archive/?\Z")
_MAX_NAME = 4096


def routes(deps: ApiDeps) -> list[StreamRoute]:
    """The routes of this resource."""

    async def put(call: Call) -> None:
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
        body = msgspec.json.encode(image_view(image, deps.oci.users(), call.project))
        fields = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
        ]
        await call.reject(201, fields, body)

    return [StreamRoute(_PATH, put, methods=frozenset({"PUT"}))]
