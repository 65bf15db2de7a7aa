"""Egress policies: rules and their texts, the errors for them, and who has which."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, strategies as st

from volant.model import (
    BASE,
    CreateVm,
    EgressRule,
    NetworkChoice,
    Networking,
    Origin,
    Problem,
    VmRow,
    covers,
    new_row,
    parse_egress_texts,
    port_ranges,
)
from volant.model._egress import MAX_PORTS_IN_RULE, MAX_RULES, parse_egress
from volant.model._snapshot import copied_row
from volant.model.stored import BadMember, check_stored_vm

from .kit import NOW

BRIDGED = Networking(default=NetworkChoice("bridge", "the daemon's setting `network`"))
labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
ports = st.integers(1, 65535)
ranges = st.tuples(ports, ports).map(sorted).map(lambda pair: f"{pair[0]}-{pair[1]}")


def row(egress: object, network: str | None = None) -> VmRow:
    request = msgspec.convert({"name": "demo", "network": network, "egress": egress}, CreateVm)
    return new_row(request, BASE, vm_id=1, now=NOW, networking=BRIDGED)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("mirror.example.org:443", EgressRule(name="mirror.example.org", ports=(443,))),
        ("*.Example.com.", EgressRule(name="*.example.com")),
        ("example.com:443,8000-8010/udp", EgressRule(name="example.com", ports=(443, "8000-8010"), protocol="udp")),
        ("10.0.0.0/8:5432/tcp", EgressRule(cidr="10.0.0.0/8", ports=(5432,), protocol="tcp")),
        ("10.0.0.0/8/udp", EgressRule(cidr="10.0.0.0/8", protocol="udp")),
        ("1.2.3.4", EgressRule(cidr="1.2.3.4/32")),
        ("1.2.3.4:53-53/udp", EgressRule(cidr="1.2.3.4/32", ports=(53,), protocol="udp")),
        ("0.0.0.0/0", EgressRule(cidr="0.0.0.0/0")),
    ],
)
def test_a_text_is_a_rule(text: str, rule: EgressRule) -> None:
    assert parse_egress_texts([text]) == (rule,)
    assert parse_egress_texts([str(rule)]) == (rule,)


@given(
    st.lists(labels, min_size=1, max_size=4),
    st.lists(ports | ranges, max_size=4),
    st.sampled_from(["tcp", "udp", None]),
)
def test_a_rule_survives_its_text_and_json(
    names: list[str], given_ports: list[int | str], protocol: str | None
) -> None:
    name = ".".join(["x", *names])
    wanted = msgspec.convert({"name": name, "ports": given_ports, "protocol": protocol}, EgressRule)
    rule = parse_egress((wanted,))[0]
    assert isinstance(rule, EgressRule)
    assert parse_egress_texts([str(rule)]) == (rule,)
    assert msgspec.json.decode(msgspec.json.encode(rule), type=EgressRule) == rule
    assert all(1 <= first <= last <= 65535 for first, last in port_ranges(rule))


@pytest.mark.parametrize(
    ("rule", "status", "field"),
    [
        ({}, 400, "egress[0]"),
        ({"cidr": "10.0.0.0/8", "name": "a.b"}, 400, "egress[0]"),
        ({"cidr": "10.0.0.0/33"}, 400, "egress[0].cidr"),
        ({"cidr": "10.0.0.0/255.0.0.0"}, 400, "egress[0].cidr"),
        ({"cidr": "10.1.0.0/8"}, 422, "egress[0].cidr"),
        ({"cidr": "::/0"}, 400, "egress[0].cidr"),
        ({"cidr": "10.0.0.0/8 accept"}, 400, "egress[0].cidr"),
        ({"cidr": "10.0.0.0/8\n"}, 400, "egress[0].cidr"),
        ({"name": "*"}, 400, "egress[0].name"),
        ({"name": "a.*.b"}, 400, "egress[0].name"),
        ({"name": "1.2.3.4"}, 422, "egress[0].name"),
        ({"name": "a b"}, 400, "egress[0].name"),
        ({"name": "a..b"}, 400, "egress[0].name"),
        ({"name": "bücher.example"}, 400, "egress[0].name"),
        ({"name": "a" * 64}, 400, "egress[0].name"),
        ({"name": ".".join(["abcdefgh"] * 29)}, 400, "egress[0].name"),
        ({"name": "a.b", "ports": ["0"]}, 400, "egress[0].ports"),
        ({"name": "a.b", "ports": ["1-65536"]}, 400, "egress[0].ports"),
        ({"name": "a.b", "ports": ["80-70"]}, 422, "egress[0].ports"),
        ({"name": "a.b", "ports": ["80 accept"]}, 400, "egress[0].ports"),
        ({"name": "a.b", "ports": [80] * (MAX_PORTS_IN_RULE + 1)}, 400, "egress[0].ports"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_place(rule: dict[str, object], status: int, field: str) -> None:
    with pytest.raises(Problem) as refused:
        row([rule])
    assert (refused.value.status, refused.value.field) == (status, field)


@pytest.mark.parametrize("egress", [[], [{"name": "a.b"}] * (MAX_RULES + 1)])
def test_a_list_has_from_one_to_sixty_four_rules(egress: list[object]) -> None:
    with pytest.raises(Problem, match="from 1 to 64 are possible") as refused:
        row(egress)
    assert refused.value.status == 400


@pytest.mark.parametrize("texts", [["none", "a.b"], ["a.b", "all"], ["a b"], ["a.b:x"], ["a.b/icmp"], [""], ["a:b:80"]])
def test_wrong_texts_are_refused(texts: list[str]) -> None:
    with pytest.raises(Problem) as refused:
        parse_egress_texts(texts)
    assert refused.value.status == 400


def test_the_default_is_all_and_rules_need_a_network() -> None:
    assert row(None).egress == "all"
    assert row("none", "none").egress == "none"
    with pytest.raises(Problem, match="has no network") as refused:
        row([{"name": "a.b"}], "none")
    assert (refused.value.status, refused.value.field) == (422, "egress")


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("all", "all", True),
        ("all", "a.b", True),
        ("none", "none", True),
        ("a.b", "none", True),
        ("none", "a.b", False),
        ("a.b", "all", False),
        ("a.b", "a.b", True),
        ("a.b", "a.b:443", True),
        ("a.b:443", "a.b", False),
        ("a.b:400-500", "a.b:443,450-500", True),
        ("a.b:400-500", "a.b:450-501", False),
        ("a.b:443", "a.b:443/udp", False),
        ("a.b:443/udp", "a.b:443/udp", True),
        ("10.0.0.0/8/tcp", "10.0.0.0/8", False),
        ("10.0.0.0/8", "10.0.0.0/8:53/udp", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.1.2.3", "10.0.0.0/8", False),
        ("*.b", "a.b", True),
        ("*.b", "*.a.b", True),
        ("*.b", "b", False),
        ("*.a.b", "*.b", False),
        ("a.b", "*.a.b", False),
        ("0.0.0.0/0", "a.b", False),
        ("*.b", "10.0.0.0/8", False),
    ],
)
def test_a_policy_covers_what_is_within_its_rules(outer: str, inner: str, expected: bool) -> None:
    assert covers(parse_egress_texts([outer]), parse_egress_texts([inner])) is expected


def test_a_rule_for_names_below_does_not_match_the_name_itself_or_a_longer_label() -> None:
    below, exact = EgressRule(name="*.example.com"), EgressRule(name="example.org")
    assert [below.matches(name) for name in ("a.example.com", "a.b.example.com", "example.com", "xexample.com")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert [exact.matches(name) for name in ("example.org", "a.example.org", "xexample.org")] == [True, False, False]
    assert not EgressRule(cidr="1.2.3.4/32").matches("1.2.3.4")


def test_copies_inherit_the_policy_and_clients_see_it() -> None:
    vm = row([{"name": "A.B", "ports": [80]}])
    assert vm.view.egress == (EgressRule(name="a.b", ports=(80,)),)
    origin = Origin("fork", vm.name, vm.id)
    copy = copied_row(vm, vm_id=2, name="copy", origin=origin, checkpoint="fork-1", now=NOW)
    assert copy.egress == vm.egress


@pytest.mark.parametrize(
    "rule",
    [
        EgressRule(cidr="10.0.0.0/8 accept\nadd rule inet t c accept"),
        EgressRule(name="A.B"),
        EgressRule(name="a.b", ports=("80 } accept",)),
        EgressRule(),
    ],
)
def test_a_stored_policy_that_volantd_cannot_have_written_is_refused(rule: EgressRule) -> None:
    vm = row("none")
    check_stored_vm(vm)
    with pytest.raises(BadMember, match="egress"):
        check_stored_vm(msgspec.structs.replace(vm, egress=(rule,)))
