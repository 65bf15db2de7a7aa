"""`Idempotency-Key`: a POST that is sent again is answered again, and what it asks for is done once."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from tests.api.kit import Api, api
from tests.names import named
from volant.http import ApiSettings
from volant.journal import IdempotencyKey, Result, StoreRefusal
from volant.model import CreateVm, Manifest, Problem, VmRow

GOOD = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}


async def post(served: Api, path: str, key: str = "k", *, body: object = None, **headers: str) -> httpx.Response:
    sent = {"Idempotency-Key": key, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return await served.client.post(path, json=body, headers=sent)


def same(first: httpx.Response, again: httpx.Response) -> None:
    """The second is the first, and says so."""
    assert (again.status_code, again.content) == (first.status_code, first.content)
    for name in ("location", "etag", "content-type"):
        assert again.headers.get(name) == first.headers.get(name)
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"


async def test_a_repeated_create_makes_one_vm(served: Api) -> None:
    first = await post(served, "/api/v1/vms", body=GOOD)
    assert first.status_code == 201
    # The same again, written otherwise and with a default that is said.
    again = await post(served, "/api/v1/vms", body={"memory_mb": 128, "plugin": "base", "cpu_cores": 1, "name": "demo"})
    same(first, again)
    assert len(served.deps.store.projection) == 1
    # It may be gone by now; what was answered stays.
    assert (await served.client.delete("/api/v1/vms/demo")).status_code == 204
    same(first, await post(served, "/api/v1/vms", body=GOOD))
    assert len(served.deps.store.projection) == 0
    other = await post(served, "/api/v1/vms", "other", body=GOOD)
    assert other.json()["id"] > first.json()["id"]


async def test_a_repeated_request_waits_for_the_same_vm(served: Api) -> None:
    first = await post(served, "/api/v1/vms?wait=crashed", body=GOOD)
    assert (first.status_code, first.headers["volant-wait"], first.json()["status"]) == (201, "met", "crashed")
    # The answer that is kept is the one of the commit.
    kept = await post(served, "/api/v1/vms", body=GOOD)
    assert (kept.json()["status"], kept.headers["idempotency-replayed"]) == ("pending", "true")
    again = await post(served, "/api/v1/vms?wait=crashed&timeout=5s", body=GOOD)
    assert (again.status_code, again.headers["volant-wait"], again.json()["status"]) == (201, "met", "crashed")
    assert (again.headers["location"], again.headers["etag"]) == ("/api/v1/vms/demo", first.headers["etag"])
    # Another VM of that name is not the one that it waits for.
    await served.client.delete("/api/v1/vms/demo")
    await served.create("demo")
    gone = await post(served, "/api/v1/vms?wait=crashed", body=GOOD)
    assert (gone.headers["volant-wait"], gone.json()) == ("failed", kept.json())


async def test_repeated_commands_and_installs_are_carried_out_once(served: Api) -> None:
    await served.crashed("demo")
    for path in ("restart", "stop?grace=1s", "stop"):
        first = await post(served, f"/api/v1/vms/demo/{path}", path)
        assert first.status_code == 200
        same(first, await post(served, f"/api/v1/vms/demo/{path}", path))
        await served.client.get("/api/v1/vms/demo?wait=stopped,crashed")
    manifest = {"name": "p", "version": "1"}
    first = await post(served, "/api/v1/plugins", body=manifest)
    assert first.status_code == 201
    same(first, await post(served, "/api/v1/plugins", body=manifest))
    first = await post(served, "/api/v1/plugins/p/enabled", body={"enabled": False})
    assert (await post(served, "/api/v1/plugins/p/enabled", "on", body={"enabled": True})).json()["enabled"]
    same(first, await post(served, "/api/v1/plugins/p/enabled", body={"enabled": False}))
    assert served.deps.store.projection.plugins[named("p")].enabled


async def test_refusals_are_repeated(served: Api) -> None:
    missing = await post(served, "/api/v1/vms/demo/start")
    await served.crashed("demo")
    again = await post(served, "/api/v1/vms/demo/start")
    assert missing.status_code == again.status_code == 404
    # Under the id of the request that it answers.
    assert again.json()["request_id"] == again.headers["x-request-id"] != missing.headers["x-request-id"]
    assert {**missing.json(), "request_id": ""} == {**again.json(), "request_id": ""}
    taken = await post(served, "/api/v1/vms", body=GOOD)
    await served.client.delete("/api/v1/vms/demo")
    assert taken.status_code == (await post(served, "/api/v1/vms", body=GOOD)).status_code == 409
    assert (await post(served, "/api/v1/vms", "new", body=GOOD)).status_code == 201
    changed = await post(served, "/api/v1/vms/demo/stop", If_Match='"0-0"')
    assert changed.status_code == (await post(served, "/api/v1/vms/demo/stop", If_Match='"0-0"')).status_code == 412


async def test_a_request_that_got_a_503_is_carried_out_when_repeated(
    served: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object, **__: object) -> None:
        raise Problem(503, "no-capacity", "no room")

    with monkeypatch.context() as patched:
        patched.setattr(served.deps.vms, "create", full)
        assert (await post(served, "/api/v1/vms", body=GOOD)).status_code == 503
    answer = await post(served, "/api/v1/vms", body=GOOD)
    assert (answer.status_code, answer.headers.get("idempotency-replayed")) == (201, None)


async def test_a_key_is_for_one_request(served: Api) -> None:
    await post(served, "/api/v1/vms", body=GOOD)
    await served.client.get("/api/v1/vms/demo?wait=crashed")
    await post(served, "/api/v1/vms/demo/stop?grace=1s")
    for path, body, headers in (
        ("/api/v1/vms", {**GOOD, "memory_mb": 256}, {}),
        ("/api/v1/vms/demo/stop?grace=2s", None, {}),
        ("/api/v1/vms/demo/stop?grace=1s", None, {"If_Match": "*,"}),
        ("/api/v1/vms/demo/stop?grace=1s", None, {"If_Match": '"1-1"'}),
    ):
        answer = await post(served, path, body=body, **headers)
        expected = 200 if headers == {"If_Match": "*,"} else 422
        assert answer.status_code == expected, (path, headers, answer.text)
        if expected == 422:
            assert answer.json()["field"] == "Idempotency-Key"
    # On another path it is another key.
    assert (await post(served, "/api/v1/vms/demo/start")).status_code == 200
    # What is no request at all is told so, and kept from nobody.
    assert (await post(served, "/api/v1/vms", "fresh", body={"name": 7})).status_code == 400
    assert (await post(served, "/api/v1/vms", "fresh", body={**GOOD, "name": "x"})).status_code == 201


async def test_a_repeated_request_during_the_first_is_409(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    create = served.deps.vms.create
    begun, gate = trio.Event(), trio.Event()

    async def slow(
        request: CreateVm, project: str, *, manifest: Manifest | None = None, key: IdempotencyKey | None = None
    ) -> VmRow:
        begun.set()
        await gate.wait()
        return await create(request, project, manifest=manifest, key=key)

    monkeypatch.setattr(served.deps.vms, "create", slow)
    answers: list[httpx.Response] = []

    async def first() -> None:
        answers.append(await post(served, "/api/v1/vms", body=GOOD))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await begun.wait()
        second = await post(served, "/api/v1/vms", body=GOOD)
        assert (second.status_code, second.json()["type"]) == (409, "urn:volant:error:idempotency-key-in-use")
        assert (await post(served, "/api/v1/vms", body={**GOOD, "name": "other"})).status_code in (409, 422)
        gate.set()
    same(answers[0], await post(served, "/api/v1/vms", body=GOOD))


async def test_the_journal_decides_which_came_first(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client comes back while its first request waits in a mailbox: nothing is kept yet when it is looked up."""
    await served.crashed("demo")
    paths = ("/api/v1/vms/demo/restart", "/api/v1/vms/nobody/start")
    first = [await post(served, path, If_Match="*") for path in paths]
    generation = served.deps.store.projection.get(named("demo"))
    await served.create("nobody")
    find = served.deps.store.responses.find
    looked_up: set[bytes] = set()

    def late(key: IdempotencyKey, now: datetime) -> Result | None:
        result = find(key, now)
        if key.scope in looked_up:
            return result
        looked_up.add(key.scope)
        return None

    monkeypatch.setattr(served.deps.store.responses, "find", late)
    same(first[0], await post(served, paths[0], If_Match="*"))
    assert served.deps.store.projection.get(named("demo")) == generation
    # It would be possible now, but it was refused.
    refused = await post(served, paths[1], If_Match="*")
    assert (refused.status_code, refused.json()["type"]) == (404, first[1].json()["type"])


@pytest.mark.parametrize("key", ["", "a b", "a" * 256, "\x7f", "\u00e9".encode("latin-1").decode("latin-1")])
async def test_what_is_no_key_is_400(served: Api, key: str) -> None:
    answer = await served.client.post("/api/v1/vms", json=GOOD, headers=[(b"Idempotency-Key", key.encode("latin-1"))])
    assert (answer.status_code, answer.json()["field"]) == (400, "Idempotency-Key")
    assert len(served.deps.store.projection) == 0


async def test_idempotency_keys_belong_to_their_caller(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=("one-0123456789abcdef", "two-0123456789abcdef"))) as served:
        answers = [
            await post(served, "/api/v1/vms", body=GOOD, X_Volant_API_Key=api_key)
            for api_key in ("one-0123456789abcdef", "two-0123456789abcdef", "one-0123456789abcdef")
        ]
        assert [answer.status_code for answer in answers] == [201, 409, 201]
        same(answers[0], answers[2])


async def test_a_refusal_that_can_not_be_stored_is_a_503(served: Api) -> None:
    ask = served.deps.journal.ask

    async def failing(message: Any, **options: Any) -> Any:
        if isinstance(message, StoreRefusal):
            raise Problem(503, "journal-full", "full")
        return await ask(message, **options)

    msgspec.structs.force_setattr(served.deps, "journal", type("Ref", (), {"ask": staticmethod(failing)})())
    assert (await post(served, "/api/v1/vms/nobody/start")).status_code == 503
    assert (await served.client.post("/api/v1/vms/nobody/start")).status_code == 404
