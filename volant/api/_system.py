"""`/healthz` and `/api/v1/system/tasks`, which need their own route: one sets its status, the other is plain text."""

from __future__ import annotations

import re

import msgspec

from volant.concurrency import dump_tasks
from volant.http import JSON, Call, StreamRoute
from volant.model import Health
from volant.operations import ApiDeps


def routes(deps: ApiDeps) -> list[StreamRoute]:
    """Returns these routes, which answer without Quart: a supervisor of the daemon waits for them."""

    async def healthz(call: Call) -> None:
        health = deps.system.health()
        await _answer(call, 200 if health == "ok" else 503, JSON, msgspec.json.encode(Health(health)))

    async def tasks(call: Call) -> None:
        call.query(credentials=False).done()
        await _answer(call, 200, "text/plain; charset=utf-8", f"{dump_tasks()}\n".encode())

    return [
        StreamRoute(re.compile(r"/healthz\Z"), healthz),
        StreamRoute(re.compile(r"/api/v1/system/tasks\Z"), tasks),
    ]


async def _answer(call: Call, status: int, content_type: str, body: bytes) -> None:
    headers = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body))]
    await call.reject(status, headers, body)
