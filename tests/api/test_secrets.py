"""Secrets over the wire: set and never read back, by REST and by MCP."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.api.kit import Api
from tests.api.test_mcp import call
from volant.model import DEFAULT_PROJECT, Key

VALUE = "correct horse battery staple"


async def put(served: Api, name: str = "token", **body: Any) -> Any:
    answer = await served.client.put(f"/api/v1/secrets/{name}", json=body or {"value": VALUE})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_secret_is_set_shown_without_its_value_used_and_deleted(served: Api) -> None:
    made = await put(served)
    assert (made["name"], made["version"], made["readable"], made["used_by"]) == ("token", 1, True, [])
    assert set(made) == {
        *("name", "project", "version", "readable", "used_by", "created_at", "updated_at"),
    }  # fmt: skip
    raw = b"\x00\xff" * 10
    again = await put(served, value=base64.b64encode(raw).decode(), encoding="base64")
    assert again["version"] == 2
    assert await served.deps.vms.secrets.value(Key(DEFAULT_PROJECT, "token")) == raw
    vm = await served.create("demo", env={"PLAIN": "x", "TOKEN": {"secret": "token"}}, secrets=["token:/run/app/t"])
    assert vm["secrets"] == ["token"]
    shown = (await served.client.get("/api/v1/secrets/token")).json()
    assert shown["used_by"] == ["demo"]
    assert (await served.client.get("/api/v1/secrets")).json() == [shown]
    used = await served.client.delete("/api/v1/secrets/token")
    assert (used.status_code, "demo" in used.json()["detail"]) == (409, True)
    assert (await served.client.delete("/api/v1/vms/demo")).status_code == 204
    assert (await served.client.delete("/api/v1/secrets/token")).status_code == 204
    for method in ("GET", "DELETE"):
        assert (await served.client.request(method, "/api/v1/secrets/token")).status_code == 404


@pytest.mark.parametrize(
    ("name", "body", "field"),
    [
        ("token", {"value": ""}, "value"),
        ("token", {"value": "staple" * 11000}, "value"),
        ("token", {"value": "staple!", "encoding": "base64"}, "value"),
        ("token", {"value": ["staple"]}, "value"),
        ("token", {"value": "staple", "encoding": "hex"}, "encoding"),
        ("token", {"value": "staple", "more": 1}, "more"),
        ("token", {}, "value"),
        ("No", {"value": "staple"}, "name"),
    ],
)
async def test_what_is_no_secret_is_refused_without_a_part_of_it(
    served: Api, name: str, body: dict[str, Any], field: str
) -> None:
    answer = await served.client.put(f"/api/v1/secrets/{name}", json=body)
    assert (answer.status_code, answer.json().get("field")) == (400, field), answer.text
    assert "staple" not in answer.text
    assert (await served.client.get("/api/v1/secrets")).json() == []


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"env": {"T": {"secret": "none"}}}, 404, "env.T"),
        ({"secrets": ["none"]}, 404, "secrets"),
        ({"env": {"T": {"secret": "No"}}}, 400, "env.T.secret"),
        ({"env": {"T": {"secret": "token", "more": 1}}}, 400, "env.T.more"),
        ({"env": {"T": 1}}, 400, "env.T"),
        ({"secrets": ["No"]}, 400, "secrets"),
        ({"secrets": ["token:/etc/token"]}, 400, "secrets"),
        ({"secrets": ["token:/run/../etc/token"]}, 400, "secrets"),
        ({"secrets": ["token:/run/volant-clone.json"]}, 400, "secrets"),
        ({"secrets": ["token:"]}, 400, "secrets"),
        ({"secrets": ["token", "token"]}, 422, "secrets"),
        ({"secrets": ["token:/run/a", "token:/run/a/b"]}, 422, "secrets"),
        ({"secrets": [f"token:/run/{number}" for number in range(33)]}, 400, "secrets"),
        ({"secrets": ["token"], "volumes": ["data:/run/secrets"]}, 422, "secrets"),
    ],
)
async def test_what_a_vm_can_not_have_is_refused_and_names_the_field(
    served: Api, fields: dict[str, Any], status: int, field: str
) -> None:
    await put(served)
    answer = await served.client.post("/api/v1/vms", json={"name": "demo", **fields})
    assert (answer.status_code, answer.json().get("field")) == (status, field), answer.text
    assert len(served.deps.store.projection) == 0


async def test_a_vm_whose_secret_can_not_be_decrypted_fails_to_boot_and_says_why(served: Api, tmp_path: Path) -> None:
    await put(served)
    (tmp_path / "keys" / "secrets.key").unlink()
    vm = await served.crashed("demo", secrets=["token"])
    assert vm["reason"]["code"] == "secret_unreadable"
    assert "<state_dir>/keys/secrets.key" in vm["reason"]["message"]
    # It gets as far as any other VM of this test does.
    assert (await served.crashed("other"))["reason"]["code"] == "image_missing"


async def test_projects_have_secrets_of_their_own(served: Api) -> None:
    await put(served)
    nowhere = await served.client.put("/api/v1/secrets/token?project=web", json={"value": "another"})
    assert (nowhere.status_code, nowhere.json()["type"]) == (404, "urn:volant:error:project-not-found")
    assert (await served.client.post("/api/v1/projects", json={"name": "web"})).status_code == 201
    other = await served.client.put("/api/v1/secrets/token?project=web", json={"value": "another"})
    assert (other.status_code, other.json()["project"]) == (200, "web")
    assert [each["project"] for each in (await served.client.get("/api/v1/secrets?project=*")).json()] == [
        "default",
        "web",
    ]
    await put(served, "mine")
    answer = await served.client.post("/api/v1/vms?project=web", json={"name": "demo", "secrets": ["mine"]})
    assert (answer.status_code, answer.json()["field"]) == (404, "secrets")
    full = await served.client.delete("/api/v1/projects/web")
    assert (full.status_code, "secret token" in full.json()["detail"]) == (409, True)


async def test_keys_are_replaced(served: Api, tmp_path: Path) -> None:
    await put(served)
    file = tmp_path / "keys" / "secrets.key"
    file.write_text("ab" * 32 + "\n" + file.read_text())
    done = await served.client.post("/api/v1/system/secrets/reencrypt")
    assert done.json() == {"reencrypted": 1, "unreadable": []}


async def test_a_model_sees_names_and_no_values(served: Api) -> None:
    await put(served)
    listed = await call(served, "secrets_list")
    (shown,) = listed["structuredContent"]["secrets"]
    assert shown["name"] == "token"
    assert VALUE not in str(listed)
    vm = await call(served, "vms_create", name="demo", memory_mb=128, env={"T": {"secret": "token"}}, wait=False)
    assert vm["structuredContent"]["vm"]["secrets"] == ["token"]


async def test_more_files_than_a_vm_can_have_are_refused_before_they_are_compared(served: Api) -> None:
    many = [f"token:/run/{number}" for number in range(40_000)]
    with trio.fail_after(30):
        answer = await served.client.post(
            "/api/v1/vms", json={"name": "demo", "cpu_cores": 1, "memory_mb": 128, "secrets": many}
        )
    assert (answer.status_code, answer.json()["field"]) == (400, "secrets")
