"""A short answer costs one write, and no head waits for a body that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.api.kit import api, bare, request, running
from volant.http._connection import Connection


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What connections write, write by write."""
    written: list[bytes] = []
    write = Connection._write

    async def record(self: Connection, data: bytes) -> None:
        written.append(data)
        await write(self, data)

    monkeypatch.setattr(Connection, "_write", record)
    return written


async def test_head_and_body_of_an_answer_go_out_together(tmp_path: Path, writes: list[bytes]) -> None:
    async with api(tmp_path) as server:
        answer = await server.client.get("/healthz")
    assert answer.json()["status"] == "ok"
    assert len(writes) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_head_without_a_body_is_sent_at_the_end_of_its_answer(writes: list[bytes], method: str) -> None:
    async def empty(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with running(bare(empty)) as server:
        # Twice, as the second would get what the first has kept back.
        for _ in range(2):
            assert (await server.ask(request(method, "/"))).status == 200
    assert len(writes) == 2
