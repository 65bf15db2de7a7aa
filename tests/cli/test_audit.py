"""`volar audit` prints the records of a real API, follows them, and continues after a lost connection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from tests.api.kit import api
from tests.cli.kit import Done, volar
from tests.client.kit import Handler, Request, problem, send_head, serving
from volant.client import AuditGap, AuditRecord, Client, ClientProblem
from volant.model import Caller, Cause, LogRange


def cause(number: int, caller: str = "key:ci") -> Cause:
    return Cause(
        operation="stop_vm", caller=Caller(caller, caller, address="10.0.0.7"), request_id=f"r{number}", target="demo",
        project="web",
    )  # fmt: skip


async def test_records_are_printed_and_filtered(tmp_path: Path) -> None:
    async with api(tmp_path) as served:

        async def run(*words: str) -> Done:
            return await volar(None, "audit", *words, environ={"VOLANT_API_BASE": str(served.client.base_url)})

        for number in range(60):
            await served.deps.recorder.answer(cause(number, "key:ci" if number % 2 else "key:\x1b[2J"), None)
        lines = (await run()).out.decode().splitlines()
        assert len(lines) == 50
        assert lines[-1].endswith("key:ci 10.0.0.7  web  stop_vm demo  done  r59")
        assert b"\x1b" not in (await run("--all")).out
        found = await run("--json", "--all", "--caller", "key:ci", "--project", "web", "--since", "1h")
        records = [json.loads(line) for line in found.out.splitlines()]
        assert [record["request_id"] for record in records] == [f"r{number}" for number in range(1, 60, 2)]
        assert (await run("--until", "2020-01-01T00:00:00Z", "--all")).out == b""
        assert len((await run("--tail", "3")).out.splitlines()) == 3
        assert (await run("--since", "yesterday")).code == 2
        assert (await run("--tail", "3", "--all")).code == 2


def line(seq: int) -> bytes:
    record = {"seq": seq, "time": "2025-09-24T12:34:56Z", "vm_id": None, "project": None}
    texts = ("caller", "caller_id", "address", "operation", "target", "outcome", "request_id", "detail")
    return json.dumps(record | dict.fromkeys(texts, "x")).encode() + b"\n"


def ndjson(data: bytes) -> Handler:
    """A handler that sends these lines and breaks off."""

    async def handler(request: Request, stream: trio.abc.Stream) -> None:
        del request
        await send_head(stream, 200, Content_Type="application/x-ndjson")
        await stream.send_all(data)

    return handler


async def test_a_follower_continues_after_the_last_record_that_it_got() -> None:
    async with serving() as server:
        gap = b'{"gap":{"from":3,"to":8}}\n'
        server.routes["GET /api/v1/audit"] = [
            ndjson(line(2) + b"\n" + gap),
            ndjson(line(9)),
            problem(403, "forbidden", "enough"),
        ]
        got: list[AuditRecord | AuditGap] = []

        async def read(client: Client) -> None:
            async with client.audit(tail=5, follow=True) as feed:
                async for item in feed:
                    got.append(item)  # noqa: PERF401

        async with Client(server.base_url) as client:
            with pytest.raises(ClientProblem):
                await read(client)
        assert [item if isinstance(item, AuditGap) else item.seq for item in got] == [2, AuditGap(LogRange(3, 8)), 9]
        queries = [dict(request.query) for request in server.asked("/api/v1/audit")]
        wanted = [{"tail": "5"}, {"cursor": "8"}, {"cursor": "9"}]
        assert queries == [{**place, "follow": "true"} for place in wanted]
