"""`/api/v1/system/backup`: the database as one file."""

from __future__ import annotations

import re
from base64 import b64encode

from volant.http import Call, Limits, Nothing, StreamRoute, read_call_body
from volant.operations import ApiDeps

MEDIA = "application/vnd.sqlite3"


def routes(deps: ApiDeps, limits: Limits) -> list[StreamRoute]:
    """The routes of this resource."""

    async def backup(call: Call) -> None:
        call.query(credentials=False).done()
        await read_call_body(call, Nothing, limits)
        async with deps.backups.take() as taken:

            async def send() -> None:
                await call.start(
                    200,
                    [
                        (b"content-type", MEDIA.encode()),
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

    return [StreamRoute(re.compile(r"/api/v1/system/backup\Z"), backup, methods=frozenset({"POST"}))]
