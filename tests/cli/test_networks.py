"""`volar` makes, shows and removes networks, and puts VMs into them."""

from __future__ import annotations

import json
from typing import Any

from tests.client.kit import answer, serving, vm

from .kit import volar

BLUE: dict[str, Any] = {
    "name": "blue", "vms": {"web": "192.168.127.2", "db": "192.168.127.3"}, "project": "default",
    "created_at": "2025-09-24T12:34:56Z",
}  # fmt: skip


async def test_networks_are_made_listed_shown_and_removed() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/networks"] = answer(BLUE | {"vms": {}}, 201)
        server.routes["GET /api/v1/networks"] = answer([BLUE])
        server.routes["GET /api/v1/networks/blue"] = answer(BLUE)
        server.routes["DELETE /api/v1/networks/blue"] = answer(None, 204)
        made = await volar(server, "networks", "create", "blue")
        listed = await volar(server, "networks", "list")
        shown = await volar(server, "networks", "get", "blue")
        as_json = await volar(server, "networks", "get", "blue", "--json")
        gone = await volar(server, "networks", "delete", "blue")
    assert made.out.decode().strip() == "network blue is created"
    assert listed.out.decode().splitlines()[1].split()[:2] == ["blue", "2"]
    assert "web=192.168.127.2, db=192.168.127.3" in shown.out.decode()
    assert json.loads(as_json.out) == BLUE
    assert gone.out.decode().strip() == "network blue is deleted"


async def test_a_vm_is_made_in_a_network_with_ports() -> None:
    made = vm(network="blue", network_reason="asked for when it was created", ip_address="192.168.127.2",
              ports=["127.0.0.1:8080:80/tcp"])  # fmt: skip
    async with serving() as server:
        server.routes["POST /api/v1/vms"] = answer(made, 201)
        server.routes["GET /api/v1/vms/demo"] = answer(made)
        done = await volar(server, "vms", "create", "demo", "--network", "blue", "-p", "8080:80", "-p", "53:53/udp")
        body = json.loads(server.requests[-1].body)
        shown = await volar(server, "vms", "get", "demo")
        wrong = await volar(server, "vms", "create", "demo", "--from-snapshot", "warm", "--network", "blue")
    assert done.code == 0, done
    assert (body["network"], body["ports"]) == ("blue", ["8080:80", "53:53/udp"])
    said = shown.out.decode()
    assert "blue (asked for when it was created)" in said
    assert "127.0.0.1:8080:80/tcp" in said
    assert wrong.code == 2


async def test_rules_are_written_as_texts_and_sent_as_a_list() -> None:
    rules = [{"name": "mirror.example.org", "ports": [443]}, {"cidr": "10.0.0.0/8", "ports": [53], "protocol": "udp"}]
    made = vm(egress=rules)
    async with serving() as server:
        server.routes["POST /api/v1/vms"] = answer(made, 201)
        server.routes["GET /api/v1/vms/demo"] = answer(made)
        options = ("--egress", "mirror.example.org:443", "--egress", "10.0.0.0/8:53/udp")
        done = await volar(server, "vms", "create", "demo", *options)
        body = json.loads(server.requests[-1].body)
        shown = await volar(server, "vms", "get", "demo")
        none = await volar(server, "vms", "create", "demo", "--egress", "none")
        body_of_none = json.loads(server.requests[-1].body)
    assert done.code == none.code == 0, done
    assert body["egress"] == rules
    assert body_of_none["egress"] == "none"
    assert "mirror.example.org:443, 10.0.0.0/8:53/udp" in shown.out.decode()


async def test_a_wrong_rule_is_refused_before_anything_is_sent() -> None:
    async with serving() as server:
        wrong = await volar(server, "vms", "create", "demo", "--egress", "10.0.0.1/8")
        both = await volar(server, "vms", "create", "demo", "--egress", "none", "--egress", "a.example")
        copied = await volar(server, "vms", "create", "demo", "--from-snapshot", "warm", "--egress", "none")
        assert server.requests == []
    assert (wrong.code, both.code, copied.code) == (2, 2, 2)
    assert "use 10.0.0.0/8, or 10.0.0.1 for the one address" in " ".join(wrong.err.split())
    assert "give `none` alone" in " ".join(both.err.split())
