"""The text of egress rules; `test_egress.py` loads them into a kernel."""

from __future__ import annotations

from tests.network.kit import SETTINGS
from volant.model import parse_egress_texts
from volant.network import EgressGuest
from volant.network._egress_rules import EgressState, added, allowed, egress_ruleset, removed, sets_of


def guest(*rules: str, user: int | None = None) -> EgressGuest:
    policy = parse_egress_texts(rules)
    where = {"address": "10.87.0.2"} if user is None else {}
    return EgressGuest(vm_id=7, egress=policy, gateway="10.87.0.1", user=user, **where)


def rules_of(text: str) -> list[str]:
    start = f"add rule {SETTINGS.egress_table} vm-7 "
    return [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]


def test_names_with_the_same_ports_share_a_set() -> None:
    one = guest("a.example:443", "b.example:443", "c.example:443/udp", "d.example", "10.0.0.0/8:443")
    assert {name: [rule.name for rule in rules] for name, rules in sets_of(one).items()} == {
        "names-7-0": ["a.example", "b.example"],
        "names-7-1": ["c.example"],
        "names-7-2": ["d.example"],
    }


def test_rules_have_ports_and_protocols_and_ports_do_not_overlap() -> None:
    one = guest("10.0.0.0/8:443,440-445,80,81", "10.1.0.0/16", "10.2.0.0/16/udp", "10.3.0.0/16:53/udp")
    found = [rule for rule in rules_of(added(SETTINGS, one, EgressState(port=5300))) if rule.startswith("ip daddr 10.")]
    assert [rule for rule in found if "10.87" not in rule] == [
        "ip daddr 10.0.0.0/8 meta l4proto { tcp } th dport { 80-81, 440-445 } accept",
        "ip daddr 10.1.0.0/16 accept",
        "ip daddr 10.2.0.0/16 meta l4proto { udp } accept",
        "ip daddr 10.3.0.0/16 meta l4proto { udp } th dport { 53 } accept",
    ]


def test_the_last_rules_count_and_reject() -> None:
    assert rules_of(added(SETTINGS, guest("none"), EgressState(port=5300)))[-2:] == [
        "counter name denied-7",
        "reject with icmpx admin-prohibited",
    ]


def test_without_a_resolver_no_dns_gets_through_to_the_host() -> None:
    text = added(SETTINGS, guest("a.example"), EgressState(port=0))
    assert "resolvers" not in text
    assert [rule for rule in rules_of(text) if "dport 53" in rule] == [
        "ip daddr 10.87.0.1 meta l4proto { tcp, udp } th dport 53 reject with icmpx admin-prohibited"
    ]


def test_what_is_added_is_removed() -> None:
    for one in (guest("a.example", "b.example:80"), guest("none", user=90000)):
        made = [line.split() for line in added(SETTINGS, one, EgressState(port=5300)).splitlines()]
        gone = [line.split() for line in removed(SETTINGS, one, 5300).splitlines()]
        for kind in ("chain", "set", "counter", "element"):
            assert sorted(words[1:5] for words in made if words[:2] == ["add", kind]) == sorted(
                words[1:5] for words in gone if words[:2] == ["delete", kind]
            )


def test_addresses_are_allowed_for_their_seconds() -> None:
    text = allowed(SETTINGS, "names-7-0", {"45.0.0.1": 60.4, "45.0.0.2": 0.2})
    assert text.splitlines()[-1].endswith("{ 45.0.0.1 timeout 60s, 45.0.0.2 timeout 1s }")
    assert allowed(SETTINGS, "names-7-0", {}) == ""


def test_a_passt_without_rules_is_closed() -> None:
    assert "meta skuid 90112-98301 ct state new reject" in egress_ruleset(SETTINGS, [], range(90112, 98302))
