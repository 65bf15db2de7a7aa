"""An operation is said once: from its declaration come its route, its document, its tool and the client's method."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from tests.api.kit import Api, api
from tests.api.test_mcp import call, rpc
from volant.api._openapi import document
from volant.client import Client, ClientProblem
from volant.client._transport import Transport
from volant.http import Access, ApiSettings
from volant.journal import AddNetwork, NetworkCreated, ask_journal
from volant.model import Caller, CreateNetwork, Permission, Problem, Role, Status
from volant.operations import TABLE, Context, Table, Tool, find_vm
from volant.operations._client import client_module
from volant.operations._parameters import Integer


class Greeting(msgspec.Struct, frozen=True):
    text: str
    times: int


class Words(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    first: str
    second: str = "world"


def greeted() -> Table:
    table = TABLE.copy()

    @table.operation(
        "POST /api/v1/vms/{name}/greet",
        permission=Permission.CONTROL,
        answer="What was said",
        errors=(409,),
        tool=Tool(idempotent=True),
    )
    async def greet_vm(
        context: Context, name: str, *, body: Words, times: Annotated[int, Integer(help="How often", maximum=3)] = 1
    ) -> Greeting:
        """Greet a VM.

        It does not answer.
        """
        row = find_vm(context.deps, context.named(name))
        if body.first == "silence":
            raise Problem(409, "not-now", f"VM {row.name!r} sleeps", vm=row.name)
        return Greeting(f"{body.first} {body.second} {row.name}", times)

    @table.operation(
        "POST /api/v1/networks/{name}/mirror", permission=Permission.CONTROL, answer="It is there", idempotent=True
    )
    async def mirror_network(
        context: Context, name: str, *, copies: Annotated[int, Integer(help="How often", maximum=3)] = 1
    ) -> NetworkCreated:
        """Make networks like this one."""
        for number in range(1, copies):
            await ask_journal(context.deps.journal, AddNetwork(CreateNetwork(name=f"{name}{number}"), context.project))
        wanted = CreateNetwork(name=f"{name}{copies}")
        return NetworkCreated.of(
            await ask_journal(context.deps.journal, AddNetwork(wanted, context.project, context.key))
        )

    @table.operation("POST /api/v1/vms/{name}/nudge", permission=Permission.CONTROL, answer="Nudged", tool=True)
    async def nudge_vm(context: Context, name: str) -> None:
        """Nudge a VM."""
        find_vm(context.deps, context.named(name))

    return table


class Callers(Access):
    """Gives each caller the role that the test says."""

    role = Role.ADMIN

    def authenticate(self, scope: Any, *, in_query: bool) -> Caller:
        return msgspec.structs.replace(super().authenticate(scope, in_query=in_query), role=self.role)


@pytest.fixture
def callers() -> Callers:
    return Callers(ApiSettings())


@pytest.fixture
async def served(tmp_path: Path, callers: Callers) -> AsyncIterator[Api]:
    async with api(tmp_path, table=greeted(), access=callers, checked=False) as running:
        await running.crashed("demo")
        yield running


async def test_an_operation_is_a_route_with_checked_parameters(served: Api) -> None:
    async def post(**query: str) -> Any:
        return await served.client.post("/api/v1/vms/demo/greet", params=query, json={"first": "hello"})

    assert (await post(times="2")).json() == {"text": "hello world demo", "times": 2}
    assert (await post(times="4")).json()["field"] == "times"
    assert (await post(colour="red")).json()["field"] == "colour"
    wrong = await served.client.post("/api/v1/vms/demo/greet", json={"first": "a", "third": "b"})
    assert (wrong.status_code, wrong.json()["field"]) == (400, "third")
    assert (await served.client.post("/api/v1/vms/none/greet", json={"first": "a"})).status_code == 404


def test_an_operation_is_in_the_document_with_its_errors() -> None:
    shown = document(greeted())["paths"]["/api/v1/vms/{name}/greet"]["post"]
    assert (shown["operationId"], shown["summary"]) == ("greet_vm", "Greet a VM")
    assert shown["description"] == "It does not answer."
    assert [parameter["name"] for parameter in shown["parameters"]] == ["name", "times", "Volant-Project"]
    assert {"200", "400", "401", "403", "404", "409"} <= shown["responses"].keys()
    assert "/api/v1/vms/{name}/greet" not in document()["paths"]


@pytest.mark.parametrize("modern", [False, True])
async def test_an_operation_is_a_tool(served: Api, modern: bool) -> None:
    listed = (await rpc(served, "tools/list", {}, modern=modern))["result"]["tools"]
    (tool,) = [each for each in listed if each["name"] == "vms_greet"]
    assert tool["inputSchema"]["properties"].keys() == {"vm", "first", "second", "times"}
    assert set(tool["inputSchema"]["required"]) == {"vm", "first"}
    assert tool["annotations"]["idempotentHint"]
    said = await call(served, "vms_greet", modern=modern, vm="demo", first="hello", times=3)
    assert said["structuredContent"] == {"text": "hello world demo", "times": 3}
    failed = await call(served, "vms_greet", modern=modern, vm="demo", first="silence")
    assert failed["isError"]
    assert "VM 'demo' sleeps" in failed["content"][0]["text"]


async def test_an_operation_is_a_method_of_the_client(served: Api) -> None:
    names: dict[str, Any] = {"__name__": "volant.client._operations", "__package__": "volant.client"}
    source = client_module(greeted())
    # The types of the body and the answer are the test's own; those of the product are the model's.
    source = re.sub(r"^    (Greeting|Words),\n", "", source, flags=re.M)
    exec(compile(source, "<client>", "exec"), names)
    names |= {"Greeting": Greeting, "Words": Words}
    async with Client(f"http://127.0.0.1:{served.server.port}") as client:
        transport: Transport = client._transport
        vms = names["VmsOperations"](transport)
        assert await vms.greet("demo", Words("good", "morning"), times=2) == Greeting("good morning demo", 2)
        with pytest.raises(ClientProblem) as refused:
            await vms.greet("demo", Words("silence"))
        assert refused.value.code == "not-now"


async def test_any_operation_can_be_sent_again_with_a_key(served: Api) -> None:
    async def post(**query: str) -> Any:
        headers = {"Idempotency-Key": "k"}
        return await served.client.post("/api/v1/networks/n/mirror", params=query, headers=headers)

    first = await post(copies="2")
    assert (first.status_code, first.json()["name"]) == (200, "n2")
    again = await post(copies="2")
    assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")
    assert (await post(copies="3")).status_code == (await post()).status_code == 422
    assert len((await served.client.get("/api/v1/networks")).json()) == 2


async def test_a_tool_without_a_result_says_what_it_did(served: Api) -> None:
    nudged = await call(served, "vms_nudge", vm="demo")
    assert nudged["structuredContent"] == {"done": "Nudge a VM", "name": "demo"}
    deleted = await call(served, "vms_delete", vm="demo")
    assert deleted["structuredContent"] == {"name": "demo", "deleted": True}


async def swapped(context: Context, name: str, vm: str) -> None: ...


async def unkept(context: Context) -> Greeting:
    raise AssertionError


async def two_bodies(context: Context, *, body: CreateNetwork | Words) -> None: ...


@pytest.mark.parametrize(
    ("route", "function", "declared", "why"),
    [
        ("POST /x/{vm}/{name}", swapped, {}, "not what the path names"),
        ("POST /x", unkept, {"idempotent": True}, "the journal keeps no .*Greeting"),
        ("POST /x", unkept, {"waits_for": Status.RUNNING}, "needs a VM"),
        ("POST /x", two_bodies, {"tool": True}, "a tool takes one body"),
    ],
)
def test_what_can_not_be_derived_is_refused(route: str, function: Any, declared: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"{route.replace('{', '.').replace('}', '.')} .{function.__name__}.: .*{why}"):
        TABLE.copy().operation(route, permission=Permission.VIEW, answer="", **declared)(function)


async def test_a_permission_is_enforced_for_rest_tools_and_commands(served: Api, callers: Callers) -> None:
    callers.role = Role.VIEWER
    answer = await served.client.post("/api/v1/vms/demo/greet", json={"first": "hello"})
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:volant:error:forbidden")
    refused = await call(served, "vms_greet", vm="demo", first="hello")
    assert refused["isError"]
    assert "needs the permission 'control'" in refused["content"][0]["text"]
    command = {"command": "volant.vms.delete", "params": {"name": "demo"}}
    assert "needs the permission" in (await served.client.post("/api/v1/mcp", json=command)).json()["error"]
    for path in ("/api/v1/vms/demo/agent/v1/info", "/api/v1/system/tasks", "/nothing/is/here"):
        assert (await served.client.get(path)).status_code == 403
    assert (await served.client.get("/api/v1/vms/demo")).status_code == 200
    assert (await served.client.get("/healthz")).status_code == 200


@pytest.mark.parametrize("role", Role)
def test_each_role_has_the_permissions_of_those_before_it(role: Role) -> None:
    before = list(Role)[: list(Role).index(role)]
    assert all(other.permissions < role.permissions for other in before)
    assert Permission.PUBLIC in role.permissions


async def test_a_resource_needs_the_permission_of_the_operation_that_reads_it(served: Api, callers: Callers) -> None:
    callers.role = Role.VIEWER
    assert (await rpc(served, "resources/read", {"uri": "volant://vms/demo"}))["result"]["contents"]
    for uri in ("volant://vms/demo/logs", "volant://vms/demo/files/etc/shadow"):
        refused = await rpc(served, "resources/read", {"uri": uri})
        assert "needs the permission 'use'" in refused["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/api/v1/vms/demo/openapi", "/api/v1/vms/demo%2Fopenapi", "/api/v1/vms/demo/open%61pi"]
)
async def test_another_spelling_of_a_path_needs_the_same_permission(served: Api, callers: Callers, path: str) -> None:
    callers.role = Role.VIEWER
    answer = await served.client.get(path)
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:volant:error:forbidden")
    assert "permission 'use'" in answer.json()["detail"]
    assert (await served.client.get("/api/v1/%76ms")).status_code == 200


async def test_a_part_of_a_path_may_be_called_like_a_method(served: Api) -> None:
    for path in ("/healthz/GET", "/api/v1/vms/demo/GET", "/api/v1/vms/demo/GET/GET"):
        assert (await served.client.get(path)).status_code == 404, path
    found = TABLE.find("GET", "/api/v1/vms/demo/agent/healthz/GET")
    assert found is not None
    assert found.name == "get_agent"


def test_every_operation_has_a_permission_and_is_found_by_its_path() -> None:
    for operation in TABLE:
        assert isinstance(operation.permission, Permission)
        path = re.sub(r"{\w+}", "x", operation.path)
        assert TABLE.find(operation.method, path) is operation, operation.name


def test_two_operations_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="pause_vm"):
        TABLE.copy().declare("GET /x", "pause_vm", Permission.VIEW, "", answers={})
