"""A caller with a key gets its share and no more; others don't notice."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from tests.api.kit import Api, api, read_head, request, streamed
from tests.api.test_access import problem
from volant.http import ApiSettings, CallerLimits
from volant.http._caller_limits import CallerUse
from volant.model import Caller, Problem

ROOMY = CallerLimits(requests_per_s=0, at_once=0, body_bytes=0)


async def keys_of(served: Api, *names: str) -> list[str]:
    keys: list[str] = []
    for name in names:
        headers = {"X-Volant-API-Key": keys[0]} if keys else {}
        made = await served.client.post("/api/v1/keys", json={"name": name, "role": "admin"}, headers=headers)
        assert made.status_code == 201, made.text
        keys.append(made.json()["key"])
    return keys


async def test_streams_at_once_are_limited_for_each_key(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(caller_limits=replace(ROOMY, at_once=3))) as served:
        mine, other = await keys_of(served, "mine", "other")
        async with AsyncExitStack() as stack:
            for _ in range(3):
                body = await stack.enter_async_context(
                    streamed(served.server, "/api/v1/events/vms", X_Volant_API_Key=mine)
                )
                assert body.status == 200
            refused = await served.server.get("/api/v1/vms", X_Volant_API_Key=mine)
            assert "key:mine has 3 requests and streams open" in problem(refused, 429)["detail"]
            assert refused.headers["retry-after"] == "1"
            assert (await served.server.get("/api/v1/vms", X_Volant_API_Key=other)).status == 200
        with trio.fail_after(20):
            while (await served.server.get("/api/v1/vms", X_Volant_API_Key=mine)).status != 200:  # noqa: ASYNC110
                await trio.sleep(0.01)
        shown = (await served.client.get("/metrics", headers={"X-Volant-API-Key": other})).text
        assert 'volant_limited_requests_total{limit="at_once"}' in shown


async def test_bodies_under_way_are_limited_for_each_key(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(caller_limits=replace(ROOMY, body_bytes=100_000))) as served:
        mine, other = await keys_of(served, "mine", "other")
        # The first one does not finish.
        async with await served.server.connect() as slow:
            headers = {"Content_Type": "application/json", "Content_Length": "90000"}
            await slow.send_all(request("POST", "/api/v1/vms", X_Volant_API_Key=mine, **headers) + b" " * 80_000)
            text = b'{"name":"x"' + b" " * 30_000
            with trio.fail_after(20):
                while True:
                    sent = request("POST", "/api/v1/vms", text, X_Volant_API_Key=mine, Content_Type="application/json")
                    answer = await served.server.ask(sent)
                    if answer.status == 429:
                        break
                    await trio.sleep(0.01)
            assert "bodies of the requests of key:mine" in problem(answer, 429)["detail"]
            sent = request("POST", "/api/v1/vms", text, X_Volant_API_Key=other, Content_Type="application/json")
            problem(await served.server.ask(sent), 400)
        # What it held is free again.
        with trio.fail_after(20):
            while served.access.use._bodies:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_requests_a_second_are_limited_and_their_pause_is_short(autojump_clock: MockClock) -> None:
    use, limits = CallerUse(), CallerLimits(requests_per_s=10)
    caller = Caller("id", "key:ci", limited=True)

    def sent() -> bool:
        try:
            use.take_request(caller, limits)
        except Problem:
            return False
        use.give_back_request(caller)
        return True

    assert [sent() for _ in range(30)].count(True) == 20
    await trio.sleep(1)
    assert [sent() for _ in range(30)].count(True) == 10
    assert use.refused["requests"] == 30
    assert not use._at_once


@pytest.mark.parametrize("caller", [Caller("uid 0", "uid 0"), Caller("anonymous", "anonymous")])
async def test_who_sets_the_limits_has_none(caller: Caller) -> None:
    use = CallerUse()
    for _ in range(1000):
        use.take_request(caller, CallerLimits(requests_per_s=1, at_once=1))
    assert not use.refused


async def test_failed_authentication_is_counted(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        (key,) = await keys_of(served, "ops")
        for _ in range(3):
            problem(await served.server.get("/api/v1/vms", X_Volant_API_Key="wrong-key-of-somebody"), 401)
        problem(await served.server.get("/api/v1/vms"), 401)
        shown = (await served.client.get("/metrics", headers={"X-Volant-API-Key": key})).text
        assert 'volant_auth_failures_total{reason="unauthenticated"} 4.0' in shown


async def test_a_stream_that_ends_early_gives_its_place_back(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(caller_limits=replace(ROOMY, at_once=1))) as served:
        (key,) = await keys_of(served, "ops")
        for _ in range(3):
            async with await served.server.connect() as stream:
                await stream.send_all(request("GET", "/api/v1/events/vms", X_Volant_API_Key=key))
                await read_head(stream)
            with trio.fail_after(20):
                while served.access.use._at_once:  # noqa: ASYNC110
                    await trio.sleep(0.01)
