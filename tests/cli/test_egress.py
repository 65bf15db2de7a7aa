"""`volar` gives VMs egress rules and shows them."""

from __future__ import annotations

import json

from tests.client.kit import answer, serving, vm

from .kit import volar


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
