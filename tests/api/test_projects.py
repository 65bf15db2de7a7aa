"""Projects over the wire: names are their own, limits hold, and nothing of another project can be seen or guessed."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from actors import Ref
from tests.api.kit import UPGRADE, Api, api, request, streamed
from tests.api.test_mcp import call as tool_call
from tests.api.test_snapshots import kept
from tests.oci.registry import needs_registry
from tests.web_server import WebServer
from volant.host._host import LinuxThreads
from volant.http import ApiSettings
from volant.http._keys import MAX_TICKETS_OF_ONE
from volant.journal import RemoveProject, _changes, _definition_changes, ask_journal
from volant.model import Role, current_cause
from volant.operations import TABLE, Operation

GOOD = {"cpu_cores": 1, "memory_mb": 128}
IN_WEB = {"Volant-Project": "web"}
KEY = "X-Volant-API-Key"
ADMIN = "key-of-the-administrator-0123456789"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Api]:
    """With the projects `default` and `web`, and a client that is an administrator."""
    async with api(tmp_path, ApiSettings(api_keys=(ADMIN,))) as running:
        running.client.headers[KEY] = ADMIN
        made = await running.client.post("/api/v1/projects", json={"name": "web"})
        assert (made.status_code, made.headers["location"]) == (201, "/api/v1/projects/web")
        yield running


async def act_as(served: Api, *, role: Role = Role.OPERATOR, project: str = "web") -> None:
    """Lets the client use a key of a project from now on."""
    body = {"name": f"ci-{role.value}-{project}", "role": role.value, "project": project}
    made = await served.client.post("/api/v1/keys", json=body, headers={KEY: ADMIN})
    assert made.status_code == 201, made.text
    served.client.headers[KEY] = made.json()["key"]


def credentials(served: Api) -> dict[str, str]:
    """Returns the headers of the client's key, for requests that it can't send."""
    return {KEY: served.client.headers[KEY]}


async def make_one_of_each(served: Api, name: str) -> None:
    """Makes a VM, a snapshot, a network, a volume and a plugin of one name in the project `default`."""
    await kept(served, name)
    assert (await served.client.post("/api/v1/vms", json={"name": name, **GOOD})).status_code == 201
    assert (await served.client.post("/api/v1/plugins", json={"name": name, "version": "1"})).status_code == 201
    assert (await served.client.post("/api/v1/volumes", json={"name": name, "size_mb": 16})).status_code == 201
    assert (await served.client.post("/api/v1/networks", json={"name": name})).status_code == 201


async def test_one_name_is_two_things_in_two_projects(served: Api) -> None:
    for headers in ({}, IN_WEB):
        answer = await served.client.post("/api/v1/vms?wait=crashed", json={"name": "demo", **GOOD}, headers=headers)
        assert (answer.status_code, answer.json()["project"]) == (201, headers.get("Volant-Project", "default"))
        again = await served.client.post("/api/v1/vms", json={"name": "demo", **GOOD}, headers=headers)
        assert (again.status_code, again.json()["type"]) == (409, "urn:volant:error:name-taken")
        plugin = await served.client.post("/api/v1/plugins", json={"name": "p", "version": "1"}, headers=headers)
        assert plugin.status_code == 201
    first = (await served.client.get("/api/v1/vms/demo")).json()
    for query, headers in (("?project=web", {}), ("", IN_WEB)):
        second = (await served.client.get(f"/api/v1/vms/demo{query}", headers=headers)).json()
        assert (second["project"], second["id"] == first["id"]) == ("web", False)
    assert [vm["id"] for vm in (await served.client.get("/api/v1/vms?project=*")).json()] == [first["id"], second["id"]]
    assert (await served.client.delete("/api/v1/vms/demo?project=web")).status_code == 204
    assert (await served.client.get("/api/v1/vms/demo")).status_code == 200
    assert (await served.client.get("/api/v1/vms/demo?project=web")).status_code == 404


@pytest.mark.parametrize(
    ("query", "headers", "status", "said"),
    [
        ("?project=No!", {}, 400, "is not a name"),
        ("?project=web&project=default", {}, 400, "two projects"),
        ("?project=web", {"Volant-Project": "default"}, 400, "two projects"),
        ("?project=web", {"Volant-Project": "web"}, 404, "no VM"),
        ("?project=*", {}, 400, "about one project"),
        ("?project=nothing", {}, 404, "no VM"),
        ("?projects=web", {}, 400, "no parameter"),
    ],
)
async def test_a_project_is_named_once_and_well(
    served: Api, query: str, headers: dict[str, str], status: int, said: str
) -> None:
    answer = await served.client.get(f"/api/v1/vms/demo{query}", headers=headers)
    assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text


async def test_nothing_is_made_in_a_project_that_there_is_not(served: Api) -> None:
    for path, body in (
        ("vms", {"name": "a", **GOOD}),
        ("volumes", {"name": "a", "size_mb": 16}),
        ("plugins", {"name": "a", "version": "1"}),
        ("networks", {"name": "a"}),
        ("images/pull", {"reference": "app"}),
    ):
        answer = await served.client.post(f"/api/v1/{path}?project=nothing", json=body)
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:volant:error:project-not-found"), path


async def test_a_caller_of_one_project_names_no_other(served: Api) -> None:
    await act_as(served)
    answers = [await served.client.get(f"/api/v1/vms?project={name}") for name in ("default", "nothing", "*", "No!")]
    assert {(answer.status_code, answer.json()["detail"]) for answer in answers} == {
        (403, "this caller can use the project 'web' alone")
    }
    assert (await served.client.get("/api/v1/vms?project=web")).status_code == 200
    assert [each["name"] for each in (await served.client.get("/api/v1/projects")).json()] == ["web"]


async def test_lists_events_and_figures_are_those_of_the_project(served: Api) -> None:
    await make_one_of_each(served, "theirs")
    await act_as(served)
    await served.crashed("mine")
    assert [vm["name"] for vm in (await served.client.get("/api/v1/vms")).json()] == ["mine"]
    for resource in ("snapshots", "volumes", "networks"):
        assert (await served.client.get(f"/api/v1/{resource}")).json() == [], resource
    assert (await served.client.get("/api/v1/forks")).json()["nodes"] == []
    assert [each["name"] for each in (await served.client.get("/api/v1/plugins")).json()] == ["base"]
    figures = (await served.client.get("/metrics")).text
    assert 'volant_vms{status="crashed"} 1.0' in figures
    assert "journal" not in figures
    seen = b""
    async with streamed(served.server, "/api/v1/events/vms?since=0", **credentials(served)) as events:
        while b"VM_CRASHED" not in seen:
            seen += await events.more()
    assert set(re.findall(rb'"name":"([^"]+)"', seen)) == {b"mine"}
    assert set(re.findall(rb'"project":"([^"]+)"', seen)) == {b"web"}


async def test_a_model_sees_the_events_of_its_project_alone(served: Api) -> None:
    await served.crashed("theirs", labels={"customer": "acme"})
    await act_as(served, role=Role.VIEWER)
    page = (await tool_call(served, "vms_events", since="0"))["structuredContent"]
    assert page["events"] == []
    await act_as(served, role=Role.VIEWER, project="default")
    page = (await tool_call(served, "vms_events", since="0"))["structuredContent"]
    assert {event["name"] for event in page["events"]} == {"theirs"}


async def test_a_project_with_the_name_of_a_deleted_one_begins_empty(served: Api) -> None:
    await served.client.post("/api/v1/vms?wait=crashed", json={"name": "demo", **GOOD}, headers=IN_WEB)
    vm = (await served.client.get("/api/v1/vms/demo", headers=IN_WEB)).json()
    assert (await served.client.delete("/api/v1/vms/demo", headers=IN_WEB)).status_code == 204
    log = f"/api/v1/vms/demo/logs?vm_id={vm['id']}"
    assert (await served.client.get(log, headers=IN_WEB)).status_code == 200
    assert (await served.client.delete("/api/v1/projects/web")).status_code == 204
    assert (await served.client.post("/api/v1/projects", json={"name": "web"})).status_code == 201
    await act_as(served)
    assert (await served.client.get(log)).status_code == 404
    page = (await tool_call(served, "vms_events", since="0"))["structuredContent"]
    assert page["events"] == []
    await served.crashed("new")
    seen = b""
    async with streamed(served.server, "/api/v1/events/vms?since=0", **credentials(served)) as events:
        while b"VM_CRASHED" not in seen:
            seen += await events.more()
    assert set(re.findall(rb'"name":"([^"]+)"', seen)) == {b"new"}


async def test_one_project_does_not_take_what_all_have_together(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_changes, "MAX_PLUGINS", 2)
    for name, status in (("a", 201), ("b", 201), ("c", 409)):
        answer = await served.client.post("/api/v1/plugins", json={"name": name, "version": "1"}, headers=IN_WEB)
        assert answer.status_code == status, answer.text
    assert answer.json()["type"] == "urn:volant:error:too-many-plugins"
    assert (await served.client.post("/api/v1/plugins", json={"name": "c", "version": "1"})).status_code == 201


async def test_tickets_of_one_caller_take_no_room_from_others(served: Api) -> None:
    await act_as(served, role=Role.VIEWER)
    first = (await served.client.post("/api/v1/tickets")).json()["ticket"]
    for _ in range(MAX_TICKETS_OF_ONE):
        await served.client.post("/api/v1/tickets")
    assert served.access.tickets.redeem(first.encode()) is None


async def test_only_an_administrator_names_registries_that_are_not_public(served: Api) -> None:
    await act_as(served)
    for reference in ("127.0.0.1:9/app:1", "localhost:9/app", "[::1]:9/app", "169.254.169.254/app"):
        for path, body in (("images/pull", {"reference": reference}), ("vms", {"name": "a", "image": reference})):
            answer = await served.client.post(f"/api/v1/{path}", json=body)
            assert (answer.status_code, answer.json()["type"]) == (403, "urn:volant:error:registry-not-allowed")


@pytest.mark.programs
@needs_registry
async def test_a_registry_that_moves_after_the_check_is_for_administrators_alone(
    served: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up, asked = socket.getaddrinfo, list[str]()

    def moving(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "registry.test":
            return look_up(host, port, *args, **kwargs)
        asked.append(host)
        address = "127.0.0.1" if len(asked) > 1 else "93.184.215.14"
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))]

    with WebServer() as inside:
        monkeypatch.setattr(socket, "getaddrinfo", moving)
        body, administrators = {"reference": f"registry.test:{inside.port}/app:1"}, dict(served.client.headers)
        await act_as(served)
        answer = await served.client.post("/api/v1/images/pull", json=body)
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:volant:error:registry-not-allowed")
        assert len(asked) == 2
        served.client.headers.update(administrators)
        answer = await served.client.post("/api/v1/images/pull", json=body)
        # It has no TLS.
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:volant:error:registry-unreachable")


REST_S = 30.0
BODIES: dict[str, Any] = {
    "fork_vm": {},
    "take_snapshot": {},
    "push_snapshot": {"reference": "1.1.1.1/app:1"},
    "enable_plugin": {"enabled": False},
    "resize_volume": {"size_mb": 32},
    "clone_volume": {"name": "copy"},
}
NOT_IN_A_PROJECT = ("/api/v1/projects/", "/api/v1/keys/")
NAMED = [
    each
    for each in TABLE
    if {"name", "snapshot", "vm"} & set(each.arguments) and not each.path.startswith(NOT_IN_A_PROJECT)
]


@pytest.mark.parametrize("operation", NAMED, ids=lambda operation: operation.name)
async def test_what_another_project_has_looks_like_nothing(served: Api, operation: Operation) -> None:
    """Each operation that names something: of what exists elsewhere and of what exists nowhere it says the same."""
    await make_one_of_each(served, "theirs")
    await act_as(served)
    answers = [await ask(served, operation, name) for name in ("theirs", "nobody")]
    assert answers[0] == answers[1]
    assert 400 <= answers[0][0] < 500


@pytest.mark.parametrize("operation", NAMED, ids=lambda operation: operation.name)
async def test_what_another_project_has_takes_as_long_as_nothing(
    served: Api, operation: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes time is counted: calls in threads, and messages to actors, among them the journal. Times would be no
    proof on a busy machine."""
    await make_one_of_each(served, "theirs")
    await act_as(served)
    waits: Counter[str] = Counter()
    under_way = 0
    run = LinuxThreads.run

    def count(what: str) -> None:
        # The daemon's own work has no cause.
        if current_cause.get() is not None:
            waits[what] += 1

    async def in_a_thread(self: LinuxThreads, *call: Any) -> Any:
        nonlocal under_way
        count("a call in a thread")
        under_way += 1
        try:
            return await run(self, *call)
        finally:
            under_way -= 1

    async def at_rest() -> None:
        """Waits until what was made before goes on with nothing: VMs that have just crashed are being cleared away."""
        with trio.fail_after(REST_S):
            while True:
                waits.clear()
                await wait_all_tasks_blocked(0.05)
                if not waits and not under_way:
                    return

    def counting(name: str) -> None:
        before = getattr(Ref, name)

        def call(self: Any, message: Any, **options: Any) -> Any:
            count(f"{type(message).__name__} to {self.name}")
            return before(self, message, **options)

        monkeypatch.setattr(Ref, name, call)

    monkeypatch.setattr(LinuxThreads, "run", in_a_thread)
    for name in ("ask", "tell"):
        counting(name)
    counts = []
    for name in ("theirs", "nobody"):
        await at_rest()
        await ask(served, operation, name)
        counts.append(dict(waits))
    assert counts[0] == counts[1]


async def ask(served: Api, operation: Operation, name: str) -> tuple[int, str]:
    """Returns the status and the text of an answer, with each name in it as `NAME`."""
    path = re.sub(r"{(name|snapshot|vm)}", name, operation.path)
    path = re.sub(r"{(\w+)}", "1", path)
    body = BODIES.get(operation.name)
    if operation.path.startswith("/ws/") or operation.path.endswith("/console"):
        answer = await served.server.ask(request("GET", path, **UPGRADE, **credentials(served)))
        status, text = answer.status, answer.body.decode()
    else:
        sent: httpx.Response = await served.client.request(operation.method, path, json=body)
        status, text = sent.status_code, sent.text
    return status, re.sub(r'"request_id":"[^"]*"', "", text.replace(name, "NAME"))


async def test_another_project_looks_like_nothing(served: Api) -> None:
    await served.client.put("/api/v1/projects/default/quota", json={"vms": 9})
    await act_as(served)
    said = [(await served.client.get(f"/api/v1/projects/{name}")) for name in ("default", "nobody")]
    assert [answer.status_code for answer in said] == [404, 404]
    assert [answer.json()["detail"] for answer in said] == [
        f"there is no project named {name!r}" for name in ("default", "nobody")
    ]
    assert (await served.client.get("/api/v1/projects/web")).json()["name"] == "web"


async def test_references_to_another_project_are_refused_as_to_nothing(served: Api) -> None:
    await make_one_of_each(served, "theirs")
    await act_as(served)
    for member in ({"plugin": "NAME"}, {"network": "NAME"}, {"volumes": ["NAME:/d"]}, {"from_snapshot": "NAME"}):
        said = []
        for name in ("theirs", "nobody"):
            body = {key: [each.replace("NAME", name) for each in value] if isinstance(value, list) else name
                    for key, value in member.items()}  # fmt: skip
            size = {} if "from_snapshot" in body else GOOD
            answer = await served.client.post("/api/v1/vms", json={"name": "new", **size, **body})
            said.append((answer.status_code, answer.json()["detail"].replace(name, "NAME")))
        assert said[0] == said[1]
        assert said[0][0] == 404


async def test_limits_hold_for_the_project_alone(served: Api) -> None:
    put = await served.client.put("/api/v1/projects/web/quota", json={"vms": 2, "memory_mb": 300, "disk_mb": 64})
    assert put.json()["quota"]["vms"] == 2
    large = {"name": "big", "cpu_cores": 1, "memory_mb": 301}
    big = await served.client.post("/api/v1/vms", json=large, headers=IN_WEB)
    assert (big.status_code, big.json()["type"]) == (409, "urn:volant:error:quota-exceeded")
    assert "300 MiB of memory" in big.json()["detail"]
    for name, status in (("a", 201), ("b", 201), ("c", 409)):
        answer = await served.client.post("/api/v1/vms", json={"name": name, **GOOD}, headers=IN_WEB)
        assert answer.status_code == status, answer.text
    wide = await served.client.post("/api/v1/volumes", json={"name": "v", "size_mb": 65}, headers=IN_WEB)
    assert (wide.status_code, wide.json()["type"]) == (409, "urn:volant:error:quota-exceeded")
    assert (await served.client.post("/api/v1/vms", json={"name": "c", **GOOD})).status_code == 201
    used = (await served.client.get("/api/v1/projects/web")).json()["used"]
    assert (used["vms"], used["memory_mb"], used["disk_mb"]) == (2, 256, 0)
    assert (await served.client.put("/api/v1/projects/web/quota", json={})).status_code == 200
    assert (await served.client.post("/api/v1/vms", json={"name": "c", **GOOD}, headers=IN_WEB)).status_code == 201


async def test_vms_of_a_project_connect_to_no_more_than_it_allows(served: Api) -> None:
    rules = [{"name": "*.example.com", "ports": [443, "8000-8010"]}, {"cidr": "10.0.0.0/8"}]
    put = await served.client.put("/api/v1/projects/web/egress", json={"egress": rules})
    assert put.json()["egress"] == rules

    async def create(name: str, **fields: object) -> httpx.Response:
        body = {"name": name, "network": "user", **GOOD, **fields}
        return await served.client.post("/api/v1/vms", json=body, headers=IN_WEB)

    assert (await create("a")).json()["egress"] == rules
    inside = [{"name": "a.example.com", "ports": [8001]}]
    assert (await create("b", egress=inside)).json()["egress"] == inside
    assert (await create("c", egress="none")).json()["egress"] == "none"
    assert (await create("d", network="none")).json()["egress"] == "none"
    for egress in ("all", [{"name": "example.com", "ports": [443]}], [*inside, {"cidr": "0.0.0.0/0"}]):
        refused = await create("e", egress=egress)
        assert (refused.status_code, refused.json()["type"]) == (409, "urn:volant:error:egress-not-allowed")
        assert "allows *.example.com:443,8000-8010, 10.0.0.0/8" in refused.json()["detail"]
    # What is there keeps its policy; what is made of it later must fit.
    assert (await served.client.put("/api/v1/projects/web/egress", json={"egress": "none"})).status_code == 200
    assert (await served.client.get("/api/v1/vms/b", headers=IN_WEB)).json()["egress"] == inside
    assert (await create("f")).json()["egress"] == "none"
    assert (await served.client.put("/api/v1/projects/web/egress", json={"egress": "all"})).status_code == 200
    assert (await create("g")).json()["egress"] == "all"
    # Another project is not concerned.
    made = await served.client.post("/api/v1/projects", json={"name": "shop", "egress": inside})
    assert (made.status_code, made.json()["egress"]) == (201, inside)
    wrong = await served.client.post("/api/v1/projects", json={"name": "off", "egress": [{"name": "a b"}]})
    assert (wrong.status_code, wrong.json()["field"]) == (400, "egress[0].name")


async def test_creates_at_once_do_not_get_past_a_limit_together(served: Api) -> None:
    await served.client.put("/api/v1/projects/web/quota", json={"vms": 3})
    statuses: list[int] = []

    async def create(number: int) -> None:
        answer = await served.client.post("/api/v1/vms", json={"name": f"vm{number}", **GOOD}, headers=IN_WEB)
        statuses.append(answer.status_code)

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(create, number)
    assert sorted(statuses) == [201] * 3 + [409] * 5


async def test_creates_within_a_minute_are_limited_and_the_refusal_is_not_kept(served: Api) -> None:
    await served.client.put("/api/v1/projects/web/quota", json={"creates_per_minute": 2})
    headers = {**IN_WEB, "Idempotency-Key": "again"}
    for name in ("a", "b"):
        assert (await served.client.post("/api/v1/vms", json={"name": name, **GOOD}, headers=IN_WEB)).status_code == 201
        assert (await served.client.delete(f"/api/v1/vms/{name}", headers=IN_WEB)).status_code == 204
    refused = await served.client.post("/api/v1/vms", json={"name": "c", **GOOD}, headers=headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "10"), refused.text
    await served.client.put("/api/v1/projects/web/quota", json={"creates_per_minute": 3})
    assert (await served.client.post("/api/v1/vms", json={"name": "c", **GOOD}, headers=headers)).status_code == 201


async def test_a_link_leads_to_the_same_project(served: Api) -> None:
    for name in ("a", "b"):
        await served.client.post("/api/v1/vms", json={"name": name, **GOOD}, headers=IN_WEB)
    first = await served.client.get("/api/v1/vms?project=web&limit=1")
    second = await served.client.get(first.links["next"]["url"])
    assert [vm["name"] for vm in (*first.json(), *second.json())] == ["a", "b"]
    first = await served.client.get("/api/v1/audit?project=web&limit=1")
    second = await served.client.get(first.links["next"]["url"])
    assert {record["project"] for record in (*first.json(), *second.json())} == {"web"}


async def test_refused_creates_do_not_count(served: Api) -> None:
    await served.client.put("/api/v1/projects/web/quota", json={"creates_per_minute": 1})
    for name, member, status in (("a", {"network": "none-such"}, 404), ("b", {}, 201), ("c", {}, 429)):
        answer = await served.client.post("/api/v1/vms", json={"name": name, **GOOD, **member}, headers=IN_WEB)
        assert answer.status_code == status, answer.text


async def test_a_project_is_deleted_once_it_is_empty(served: Api) -> None:
    await served.client.post("/api/v1/vms", json={"name": "demo", **GOOD}, headers=IN_WEB)
    answer = await served.client.delete("/api/v1/projects/web")
    assert (answer.status_code, "VM demo" in answer.json()["detail"]) == (409, True)
    assert (await served.client.delete("/api/v1/vms/demo", headers=IN_WEB)).status_code == 204
    assert (await served.client.delete("/api/v1/projects/web")).status_code == 204
    assert (await served.client.delete("/api/v1/projects/web")).status_code == 404
    assert (await served.client.delete("/api/v1/projects/default")).status_code == 409


async def test_a_guests_query_may_have_a_project_of_its_own(served: Api) -> None:
    await served.create("demo")
    await act_as(served, project="default")
    answer = await served.client.get("/api/v1/vms/demo/ports/80/items?project=7")
    assert answer.status_code in (409, 502), answer.text


async def test_a_ticket_of_an_administrator_can_be_for_one_project(served: Api) -> None:
    ticket = (await served.client.post("/api/v1/tickets", headers=IN_WEB)).json()["ticket"]
    caller = served.access.tickets.redeem(ticket.encode())
    assert caller is not None
    assert caller.project == "web"


async def test_a_project_begins_empty_although_the_daemon_was_killed_while_one_was_deleted(served: Api) -> None:
    await served.client.post("/api/v1/vms?wait=crashed", json={"name": "demo", **GOOD}, headers=IN_WEB)
    vm = (await served.client.get("/api/v1/vms/demo", headers=IN_WEB)).json()
    assert (await served.client.delete("/api/v1/vms/demo", headers=IN_WEB)).status_code == 204
    await ask_journal(served.deps.journal, RemoveProject("web"))
    assert (await served.client.post("/api/v1/projects", json={"name": "web"})).status_code == 201
    answer = await served.client.get(f"/api/v1/vms/demo/logs?vm_id={vm['id']}", headers=IN_WEB)
    assert answer.status_code == 404


async def test_a_project_has_its_share_of_secrets(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_definition_changes, "MAX_SECRETS_OF_PROJECT", 1)
    for name, status in (("a", 200), ("a", 200), ("b", 409)):
        answer = await served.client.put(f"/api/v1/secrets/{name}", json={"value": "v"}, headers=IN_WEB)
        assert answer.status_code == status, answer.text
    assert answer.json()["type"] == "urn:volant:error:too-many-secrets"
    assert (await served.client.put("/api/v1/secrets/b", json={"value": "v"})).status_code == 200


async def test_why_a_vm_crashed_names_no_directory_of_the_host(served: Api, tmp_path: Path) -> None:
    made = await served.client.post("/api/v1/vms?wait=crashed", json={"name": "demo", **GOOD}, headers=IN_WEB)
    assert made.json()["reason"] == {
        "code": "image_missing", "message": "VOLANT_KERNEL is <state_dir>/no-kernel, and there is no such file",
        "console": [],
    }  # fmt: skip
    await act_as(served, role=Role.VIEWER)
    for path in ("/api/v1/vms/demo", "/api/v1/vms/demo/inspect", "/api/v1/vms"):
        answer = await served.client.get(path)
        assert (answer.status_code, str(tmp_path) in answer.text) == (200, False), answer.text
    seen = b""
    async with streamed(served.server, "/api/v1/events/vms?since=0", **credentials(served)) as events:
        while b"VM_CRASHED" not in seen:
            seen += await events.more()
    assert str(tmp_path).encode() not in seen
