"""Networks over the wire: what a VM has and why, those with a name, ports, and what can't be had."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Any

import pytest

from tests.api.kit import Api
from tests.api.test_mcp import call
from volant.model import NetworkChoice, Networking


async def test_a_vm_shows_its_network_address_and_ports(served: Api) -> None:
    plain = await served.create("plain")
    assert (plain["network"], plain["ip_address"], plain["mac_address"], plain["ports"]) == ("none", "", "", [])
    assert plain["network_reason"] == "the daemon's setting `network`"
    made = await served.create("demo", network="bridge", ports=["8080:80", "0.0.0.0:53:5353/udp"])
    assert (made["network"], made["ip_address"]) == ("bridge", "192.168.127.2")
    assert made["mac_address"].startswith("02:")
    assert made["ports"] == ["127.0.0.1:8080:80/tcp", "0.0.0.0:53:5353/udp"]
    assert made["network_reason"] == "asked for when it was created"
    shown = (await served.client.get("/api/v1/vms/demo")).json()
    assert {key: shown[key] for key in ("network", "ip_address", "mac_address", "ports")} == {
        key: made[key] for key in ("network", "ip_address", "mac_address", "ports")
    }


async def test_a_fallback_is_a_warning_in_the_answer_to_a_create(served: Api) -> None:
    assert (await served.create("before"))["warnings"] == []
    fallback = NetworkChoice("user", "no bridge: another daemon has the subnet", True)
    served.deps.store.networking = Networking(default=fallback)
    assert (await served.create("demo"))["warnings"] == [
        "the network is 'user': no bridge: another daemon has the subnet"
    ]
    assert (await served.create("asked", network="none"))["warnings"] == []


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"network": "No Name"}, 400, "network"),
        ({"network": "green"}, 404, "network"),
        ({"network": "bridge", "ports": ["http:80"]}, 400, "ports"),
        ({"network": "bridge", "ports": ["80:80", "80:81"]}, 422, "ports"),
        ({"network": "bridge", "ports": "80:80"}, 400, "ports"),
        ({"network": "bridge", "ports": ["8080:80"]}, 409, "ports"),
        ({"network": "none", "ports": ["80:80"]}, 422, "ports"),
        ({"ports": ["80:80"]}, 422, "ports"),
    ],
)
async def test_what_can_not_be_is_refused_and_names_the_field(
    served: Api, fields: dict[str, Any], status: int, field: str
) -> None:
    await served.create("web", network="bridge", ports=["8080:80"])
    answer = await served.client.post("/api/v1/vms", json={"name": "demo", "cpu_cores": 1, "memory_mb": 128, **fields})
    assert (answer.status_code, answer.json().get("field")) == (status, field), answer.text
    assert len(served.deps.store.projection) == 1


async def test_a_host_without_the_network_is_a_503_with_advice(served: Api) -> None:
    served.deps.store.networking = Networking(obstacles={"bridge": "it needs root; run volantd as root"})
    body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128, "network": "bridge"}
    answer = await served.client.post("/api/v1/vms", json=body)
    assert (answer.status_code, answer.json()["field"]) == (503, "network")
    assert "run volantd as root" in answer.json()["detail"]
    assert "network `none`" in answer.json()["hint"]


async def test_the_last_address_is_given_and_the_next_is_503_with_the_figure(served: Api) -> None:
    served.deps.store.networking = Networking(
        default=NetworkChoice("bridge", "the daemon's setting `network`"), subnet=IPv4Network("10.0.0.0/30")
    )
    assert (await served.create("only"))["ip_address"] == "10.0.0.2"
    body = {"name": "next", "cpu_cores": 1, "memory_mb": 128}
    answer = await served.client.post("/api/v1/vms", json=body)
    assert answer.status_code == 503
    assert "all 1 addresses of the subnet 10.0.0.0/30 are taken" in answer.json()["detail"]
    assert (await served.client.delete("/api/v1/vms/only")).status_code == 204
    assert (await served.create("next"))["ip_address"] == "10.0.0.2"


async def test_a_network_is_made_shown_used_and_removed(served: Api) -> None:
    made = await served.client.post("/api/v1/networks", json={"name": "blue"})
    assert (made.status_code, made.headers["location"]) == (201, "/api/v1/networks/blue")
    assert (made.json()["name"], made.json()["vms"]) == ("blue", {})
    await served.create("one", network="blue")
    await served.create("other", network="blue")
    await served.create("elsewhere", network="bridge")
    (shown,) = (await served.client.get("/api/v1/networks")).json()
    assert shown["vms"] == {"one": "192.168.127.2", "other": "192.168.127.3"}
    assert (await served.client.get("/api/v1/networks/blue")).json() == shown
    used = await served.client.delete("/api/v1/networks/blue")
    assert (used.status_code, "one, other" in used.json()["detail"]) == (409, True)
    for name in ("one", "other"):
        assert (await served.client.delete(f"/api/v1/vms/{name}")).status_code == 204
    assert (await served.client.delete("/api/v1/networks/blue")).status_code == 204
    assert (await served.client.get("/api/v1/networks/blue")).status_code == 404
    assert (await served.client.delete("/api/v1/networks/blue")).status_code == 404
    assert (await served.client.get("/api/v1/networks")).json() == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "bridge"}, 400),
        ({"name": "No"}, 400),
        ({}, 400),
        ({"name": "a", "more": 1}, 400),
        ({"name": "blue"}, 409),
    ],
)
async def test_a_network_that_can_not_be_is_refused(served: Api, body: dict[str, Any], status: int) -> None:
    await served.client.post("/api/v1/networks", json={"name": "blue"})
    answer = await served.client.post("/api/v1/networks", json=body)
    assert answer.status_code == status, answer.text
    assert [each["name"] for each in (await served.client.get("/api/v1/networks")).json()] == ["blue"]


async def test_a_model_makes_a_network_and_vms_in_it(served: Api) -> None:
    made = await call(served, "networks_create", name="blue")
    assert made["structuredContent"]["name"] == "blue"
    vm = await call(served, "vms_create", name="demo", cpu_cores=1, memory_mb=128, network="blue", wait=False)
    assert vm["structuredContent"]["vm"]["ip_address"] == "192.168.127.2"
    listed = await call(served, "networks_list")
    (shown,) = listed["structuredContent"]["networks"]
    assert shown["vms"] == {"demo": "192.168.127.2"}
    for refused, why in (
        (await call(served, "networks_delete", network="blue"), "demo"),
        (await call(served, "networks_create", name="blue"), "already"),
    ):
        assert refused["isError"]
        assert why in refused["content"][0]["text"]
    await call(served, "vms_delete", vm="demo")
    assert (await call(served, "networks_delete", network="blue"))["structuredContent"] == {
        "name": "blue",
        "deleted": True,
    }
    assert (await call(served, "networks_list", network="blue"))["isError"]
