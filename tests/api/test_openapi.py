"""The OpenAPI document says what the daemon serves: every route, no other, with the parameters that it takes."""

from __future__ import annotations

import ast
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import yaml
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from tests.api import conformance
from tests.api.kit import UPGRADE, Api, api
from volant.api import create_app
from volant.api._openapi import document
from volant.api._quart import quart_app
from volant.http import ApiSettings, Limits, Nothing, StreamRoute
from volant.mcp._server import McpServer
from volant.model.docstrings import member_texts
from volant.operations import TABLE, Operation

UPGRADE_HEADERS = {name.replace("_", "-"): value for name, value in UPGRADE.items()}
KEPT = Path(__file__).resolve().parents[2] / "docs" / "api" / "openapi.yaml"


def sample(operation: Operation) -> str:
    """A path that the operation is for."""
    return operation.path.format(
        name="base" if "/plugins/" in operation.path else "demo", port=8080, path="x/y", target="x",
        plugin="base", action="x", id="x", tag="volant-x-1.1", digest="0" * 32, snapshot="x", sha256="0" * 64,
    )  # fmt: skip


def test_it_is_openapi() -> None:
    validate(document())
    names = [operation.name for operation in TABLE]
    assert len(names) == len(set(names))


def test_each_tag_is_that_of_some_operation_and_is_explained() -> None:
    used = {tag for methods in document()["paths"].values() for shown in methods.values() for tag in shown["tags"]}
    assert used == {tag["name"] for tag in document()["tags"]}


def test_each_body_and_name_in_a_path_has_an_example_that_its_schema_allows() -> None:
    root = document()
    for operation in TABLE:
        shown = root["paths"][operation.path][operation.method.lower()]
        given = [(one["example"], one["schema"]) for one in shown.get("parameters", ()) if one["in"] == "path"]
        if operation.body not in (None, bytes, Nothing):
            (body,) = shown["requestBody"]["content"].values()
            given += [(one["value"], body["schema"]) for one in body["examples"].values()]
            assert body["examples"], operation.name
        for example, schema in given:
            errors = OAS31Validator({**schema, "components": root["components"]}).iter_errors(example)
            assert [error.message for error in errors] == [], operation.name


def test_the_kept_file_matches_the_code() -> None:
    assert yaml.safe_load(KEPT.read_text()) == document(), "run `make docs`"


async def test_two_threads_never_make_syntax_trees_at_once(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    # Python 3.11 sometimes fails then. All three are made late, each in a thread.
    really = ast.parse
    at_work: list[None] = []
    together: list[int] = []

    def parse(*arguments: Any, **options: Any) -> Any:
        at_work.append(None)
        together.append(len(at_work))
        # Lets another thread run.
        time.sleep(0)
        try:
            return really(*arguments, **options)
        finally:
            at_work.pop()

    monkeypatch.setattr(ast, "parse", parse)
    member_texts.cache_clear()
    app = partial(quart_app, served.deps, Limits(), TABLE)
    async with trio.open_nursery() as nursery:
        for make in (app, document.__wrapped__, partial(McpServer, served.deps)):
            nursery.start_soon(trio.to_thread.run_sync, make)
    assert len(together) > 100
    assert set(together) == {1}


async def test_every_route_is_described_and_no_other(served: Api) -> None:
    app = quart_app(served.deps, Limits(), TABLE)
    plain = {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    edge = create_app(served.deps)
    described = {
        (operation.method, operation.path): [route for route in edge._routes if serves(route, operation)]
        for operation in TABLE
    }
    assert {key for key, streams in described.items() if not streams} == plain
    assert {id(route) for streams in described.values() for route in streams} == {id(route) for route in edge._routes}


def serves(route: StreamRoute, operation: Operation) -> bool:
    if route.pattern.match(sample(operation)) is None:
        return False
    if 101 in operation.answers:
        return route.websocket
    return route.http and (route.methods is None or operation.method in route.methods)


# What is the guest's to say is not ours to check, a probe of health takes anything, and issuers add what they like.
STRICT = [
    operation
    for operation in TABLE
    if "{path}" not in operation.path
    and not {"actions", "agent", "devtools"} & set(operation.path.split("/"))
    and operation.name not in ("healthz", "take_issuer_answer")
]


@pytest.mark.parametrize("operation", STRICT, ids=lambda operation: operation.name)
async def test_routes_take_the_documented_parameters(served: Api, operation: Operation) -> None:
    await served.crashed("demo")
    body: dict[str, Any] = {}
    if operation.name == "create_vm":
        body = {"name": "other", "cpu_cores": 1, "memory_mb": 128}
    answer = await served.client.request(
        operation.method,
        sample(operation),
        params={"not-a-parameter": "1"},
        headers=UPGRADE_HEADERS if 101 in operation.answers else {},
        json=body if operation.body is not None else None,
    )
    assert answer.status_code == 400
    assert answer.json()["field"] == "not-a-parameter"
    hint = answer.json()["hint"]
    taken = set(hint.removeprefix("there are ").split(", ")) if hint.startswith("there are ") else set()
    assert taken == {parameter.name for parameter in operation.parameters if parameter.place == "query"}


@pytest.mark.parametrize("path", ["/api/v1/vms", "/api/v1/vms/demo/logs"])
async def test_integers_are_taken_up_to_the_documented_bounds(served: Api, path: str) -> None:
    await served.crashed("demo")
    parameters = document()["paths"][path.replace("demo", "{name}")]["get"]["parameters"]
    bounded = {one["name"]: one["schema"] for one in parameters if "maximum" in one["schema"]}
    assert bounded
    for name, schema in bounded.items():
        for value, status in ((schema["minimum"], 200), (schema["maximum"], 200), (schema["maximum"] + 1, 400)):
            answer = await served.client.get(path, params={name: value})
            # An id that no VM has is none of the parameter's faults.
            assert (400 if answer.status_code == 400 else 200) == status, (name, value, answer.text)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        *((text, True) for text in ("0ms", "600000ms", "000000599999ms", "600s", "10m", "010m", "0h", "000d", "7s")),
        *((text, False) for text in ("600001ms", "601s", "11m", "1h", "1d", "0000000000001s", "10", "s", "-1s", "")),
    ],
)
async def test_durations_are_taken_up_to_the_documented_bound(served: Api, text: str, good: bool) -> None:
    parameters = document()["paths"]["/api/v1/vms/{name}"]["get"]["parameters"]
    (schema,) = [one["schema"] for one in parameters if one["name"] == "timeout"]
    assert (re.search(schema["pattern"], text) is not None) == good
    await served.crashed("demo")
    answer = await served.client.get("/api/v1/vms/demo", params={"timeout": text})
    assert answer.status_code == (200 if good else 400)


async def test_answers_match_the_document() -> None:
    asked = httpx.Request("GET", "http://127.0.0.1/healthz")
    await conformance.check(httpx.Response(200, json={"status": "ok"}, request=asked))
    for wrong in (
        httpx.Response(201, json={"status": "ok"}, request=asked),
        httpx.Response(200, json={"status": "fine"}, request=asked),
        httpx.Response(200, json={"status": "ok"}, headers={"location": "/"}, request=asked),
        httpx.Response(200, text="ok", request=asked),
    ):
        with pytest.raises(AssertionError, match="/healthz"):
            await conformance.check(wrong)


async def test_the_daemon_serves_the_document(served: Api) -> None:
    answer = await served.client.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == document()


async def test_the_page_needs_no_key_and_the_document_does(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=("k" * 32,))) as served:
        assert (await served.client.get("/docs")).status_code == 200
        assert (await served.client.get("/openapi.json")).status_code == 401
        answer = await served.client.get("/openapi.json", headers={"X-Volant-API-Key": "k" * 32})
        assert answer.status_code == 200
