"""Named keys over the real API: shown once, found by their digests, ended at once."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
import trio.testing
from trio_websocket import ConnectionClosed

from tests.api.kit import UPGRADE, Api, api, streamed, websocket
from tests.api.test_access import problem
from tests.files import files_with
from tests.journal.kit import ClockHost
from volant.http import ApiSettings
from volant.model import Permission
from volant.operations import TABLE, Context, Table

SETTINGS_KEY = "a-key-of-the-settings-0123456789"
ENDED = 4401


class Desk:
    """An API, with an administrator at its Unix socket."""

    def __init__(self, served: Api, unix: httpx.AsyncClient) -> None:
        self.served = served
        self.unix = unix

    async def create(self, name: str, role: str = "admin", **more: object) -> str:
        answer = await self.unix.post("/api/v1/keys", json={"name": name, "role": role, **more})
        assert answer.status_code == 201, answer.text
        assert answer.headers["cache-control"] == "no-store"
        assert set(answer.json()) == {"name", "key"}
        return str(answer.json()["key"])

    async def delete(self, name: str) -> None:
        answer = await self.unix.delete(f"/api/v1/keys/{name}")
        assert answer.status_code == 204, answer.text

    async def status(self, key: str | None, path: str = "/api/v1/vms") -> int:
        headers = {} if key is None else {"X-Volant-API-Key": key}
        return (await self.served.client.get(path, headers=headers)).status_code


@asynccontextmanager
async def desk(
    path: Path, settings: ApiSettings | None = None, host: ClockHost | None = None, table: Table = TABLE
) -> AsyncIterator[Desk]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        place = path / "api.sock"
        place.unlink(missing_ok=True)
        sock.bind(str(place))
        sock.listen(20)
        transport = httpx.AsyncHTTPTransport(uds=str(place))
        async with (
            api(path, settings, sockets=[sock], host=host, table=table, checked=table is TABLE) as served,
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as unix,
        ):
            yield Desk(served, unix)


async def test_the_first_key_closes_tcp_also_after_a_restart(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        assert await at.status(None) == 200
        refused = await at.unix.post("/api/v1/keys", json={"name": "ci", "role": "operator"})
        assert (refused.status_code, refused.json()["type"]) == (409, "urn:volant:error:first-key-not-admin")
        assert "volar keys create" in refused.json()["hint"]
        assert await at.status(None) == 200
        key = await at.create("ops")
        assert await at.status(None) == 401
        assert await at.status(key) == 200
        assert (await at.unix.get("/api/v1/vms")).status_code == 200
    async with desk(tmp_path) as at:
        assert await at.status(None) == 401
        assert await at.status(key) == 200
        assert await at.status(key[:-1] + "x") == 401


async def test_a_key_is_shown_once_and_is_in_no_file(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        key = await at.create("ops")
        assert key.startswith("vlt_")
        assert len(key) == len("vlt_") + 64
        assert await at.status(key) == 200
        for path in ("/api/v1/keys", "/api/v1/keys/ops"):
            assert key not in (await at.unix.get(path)).text
        shown = (await at.unix.get("/api/v1/keys/ops")).json()
        assert (shown["role"], shown["project"], shown["last_used_from"]) == ("admin", None, "127.0.0.1")
        assert shown["last_used_at"] is not None
        assert shown["created_by"]
        assert [each["name"] for each in (await at.unix.get("/api/v1/keys")).json()] == ["ops"]
        assert (await at.unix.get("/api/v1/keys/none")).status_code == 404
    assert files_with(tmp_path, [key.encode()]) == []


@pytest.mark.parametrize(
    "body",
    [
        {"name": "X", "role": "admin"},
        {"name": "x"},
        {"name": "x", "role": "root"},
        {"name": "x", "role": "admin", "project": "web"},
        {"name": "x", "role": "user", "project": "No"},
        {"name": "x", "role": "user", "expires_in_s": 0},
        {"name": "x", "role": "user", "expires_in_s": 1e12},
        {"name": "x", "role": "user", "key": "chosen-by-the-client"},
    ],
)
async def test_what_makes_no_key_is_refused(tmp_path: Path, body: Mapping[str, object]) -> None:
    async with desk(tmp_path) as at:
        await at.create("ops")
        problem_ = await at.unix.post("/api/v1/keys", json=body)
        assert problem_.status_code == 400, problem_.text


async def test_an_expired_key_says_so_to_whoever_has_it(tmp_path: Path) -> None:
    async with desk(tmp_path, host=(host := ClockHost())) as at:
        await at.create("ops")
        key = await at.create("ci", "viewer", expires_in_s=60)
        assert await at.status(key) == 200
        host.pass_time(seconds=61)
        expired = problem(await at.served.server.get("/api/v1/vms", X_Volant_API_Key=key), 401)
        assert expired["type"] == "urn:volant:error:key-expired"
        assert "'ci' expired" in expired["detail"]
        unknown = problem(await at.served.server.get("/api/v1/vms", X_Volant_API_Key=key[:-1]), 401)
        assert "expire" not in msgspec.json.encode(unknown).decode()
        assert (await at.unix.get("/api/v1/keys/ci")).json()["expired"]


async def test_a_replaced_key_goes_on_for_the_overlap(tmp_path: Path) -> None:
    async with desk(tmp_path, host=(host := ClockHost())) as at:
        await at.create("ops")
        old = await at.create("ci", "viewer")
        new = (await at.unix.post("/api/v1/keys/ci/rotate", json={"overlap_s": 60})).json()["key"]
        assert (await at.status(old), await at.status(new)) == (200, 200)
        (replaced,) = (await at.unix.get("/api/v1/keys/ci")).json()["replaced"]
        assert replaced["last_used_from"] == "127.0.0.1"
        host.pass_time(seconds=61)
        assert (await at.status(old), await at.status(new)) == (401, 200)
        newest = (await at.unix.post("/api/v1/keys/ci/rotate")).json()["key"]
        assert (await at.status(new), await at.status(newest)) == (401, 200)
        assert (await at.unix.post("/api/v1/keys/none/rotate")).status_code == 404


async def test_a_request_is_recognised_over_a_replacement(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.create("ops")
        keys = [await at.create("ci", "operator")]
        keys.append((await at.unix.post("/api/v1/keys/ci/rotate", json={"overlap_s": 60})).json()["key"])
        answers = [
            await at.served.client.post(
                "/api/v1/plugins/base/enabled",
                json={"enabled": True},
                headers={"X-Volant-API-Key": key, "Idempotency-Key": "once"},
            )
            for key in keys
        ]
        assert "idempotency-replayed" not in answers[0].headers
        assert answers[0].status_code == answers[1].status_code


async def test_the_last_administrator_stays_unless_the_settings_have_a_key(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        key = await at.create("ops")
        mine = {"X-Volant-API-Key": key}
        refused = await at.served.client.delete("/api/v1/keys/ops", headers=mine)
        assert (refused.status_code, refused.json()["type"]) == (409, "urn:volant:error:last-administrator")
        assert await at.status(key) == 200
    async with desk(tmp_path, ApiSettings(api_keys=(SETTINGS_KEY,))) as at:
        assert (await at.status(SETTINGS_KEY), await at.status(key)) == (200, 200)
        await at.delete("ops")
        assert (await at.status(SETTINGS_KEY), await at.status(key)) == (200, 401)
    async with desk(tmp_path) as at:
        # A deletion opens nothing.
        assert await at.status(None) == 401


# What a key has open ends with it.


async def closed(url: str, opened: trio.Event, ends: dict[str, Any], name: str, headers: Mapping[str, str]) -> None:
    """Reads a WebSocket until the daemon closes it."""
    end = None
    async with websocket(url, extra_headers=[(k.encode(), v.encode()) for k, v in headers.items()]) as connection:
        opened.set()
        try:
            while True:
                await connection.get_message()
        except ConnectionClosed as error:
            end = error.reason
    # Only now: the test ends once it has all, and may leave no socket open.
    assert end is not None
    ends[name] = (end.code, end.reason)


def with_a_wait() -> Table:
    table = TABLE.copy()

    @table.operation("POST /api/v1/forever", permission=Permission.VIEW, answer="Never")
    async def wait_forever(context: Context) -> None:
        """Wait."""
        await context.unless_stopping(trio.sleep_forever)

    return table


@pytest.mark.parametrize("how", ["deleted", "rotated", "expired"])
async def test_streams_end_with_their_key(tmp_path: Path, how: str) -> None:
    async with desk(tmp_path, host=(host := ClockHost()), table=with_a_wait()) as at:
        await at.served.crashed("demo")
        ops = await at.create("ops")
        key = await at.create("ci", "operator", expires_in_s=3600)
        headers = {"X-Volant-API-Key": key}
        base = f"ws://127.0.0.1:{at.served.server.port}"
        ends: dict[str, Any] = {}

        async def events(name: str, key: str, opened: trio.Event) -> None:
            async with streamed(at.served.server, "/api/v1/events/vms", X_Volant_API_Key=key) as body:
                opened.set()
                while True:
                    with trio.fail_after(30):
                        if not await body.more():
                            break
                ends[name] = "ended properly"

        async def wait(opened: trio.Event) -> None:
            opened.set()
            answer = await at.served.client.post("/api/v1/forever", headers=headers)
            ends["wait"] = answer.status_code

        async with trio.open_nursery() as nursery:
            started = [trio.Event() for _ in range(6)]
            nursery.start_soon(events, "events", key, started[0])
            nursery.start_soon(events, "another's", ops, started[1])
            for number, path in enumerate(("vms/demo/logs", "agui"), 2):
                nursery.start_soon(closed, f"{base}/ws/v1/{path}", started[number], ends, path, headers)
            ticket = (await at.served.client.post("/api/v1/tickets", headers=headers)).json()["ticket"]
            later = (await at.served.client.post("/api/v1/tickets", headers=headers)).json()["ticket"]
            nursery.start_soon(closed, f"{base}/ws/v1/vms/demo/logs?ticket={ticket}", started[4], ends, "ticket", {})
            nursery.start_soon(wait, started[5])
            for event in started:
                await event.wait()
            await trio.testing.wait_all_tasks_blocked(0.05)
            if how == "deleted":
                await at.delete("ci")
            elif how == "rotated":
                assert (await at.unix.post("/api/v1/keys/ci/rotate")).status_code == 200
            else:
                host.pass_time(hours=2)
                at.served.access.recheck()
            with trio.fail_after(20):
                while len(ends) < 5:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert "another's" not in ends
            nursery.cancel_scope.cancel()
        reason = "expired" if how == "expired" else "deleted or replaced"
        assert ends["events"] == "ended properly"
        for name in ("vms/demo/logs", "agui", "ticket"):
            assert ends[name][0] == ENDED, (name, ends)
            assert reason in ends[name][1]
        assert ends["wait"] == 401
        refused = problem(await at.served.server.get(f"/ws/v1/vms/demo/logs?ticket={later}", **UPGRADE), 401)
        assert reason in refused["detail"]
