"""Changing a firewall gives the same result as loading it completely."""

from __future__ import annotations

from ipaddress import IPv4Network
from random import Random

import pytest

from tests.network.kit import SETTINGS, nft, ruleset, vm
from volant.model import VmRow
from volant.network._plan import plan_of
from volant.network._rules import Rules, delete_tables, full_ruleset, rules_of, ruleset_changes


def rules(*rows: VmRow) -> Rules:
    return rules_of(plan_of(SETTINGS, rows))


def many(rng: Random) -> list[VmRow]:
    """Returns random VMs in random networks with random ports."""
    hosts = ["127.0.0.1", "0.0.0.0", "198.51.100.1"]
    return [
        vm(
            number,
            rng.choice(["bridge", "blue", "green"]),
            *(f"{rng.choice(hosts)}:{8000 + number}:{rng.choice([80, 81])}/{rng.choice(['tcp', 'udp'])}",)
            * rng.randrange(2),
        )
        for number in rng.sample(range(1, 12), rng.randrange(8))
    ]


def test_the_cost_of_a_vm_does_not_depend_on_the_number_of_vms() -> None:
    subnet = IPv4Network("10.88.0.0/16")

    def elements_of_one_more(count: int) -> int:
        rows = [vm(number, "blue", f"{8000 + number}:80", subnet=subnet) for number in range(1, count + 2)]
        text = ruleset_changes(rules(*rows[:-1]), rules(*rows))
        assert "table" not in text
        return len(text)

    assert elements_of_one_more(1000) - elements_of_one_more(10) < 40


def test_equal_rulesets_have_no_changes() -> None:
    assert ruleset_changes(rules(vm(1), vm(2, "blue")), rules(vm(2, "blue"), vm(1))) == ""


def test_the_older_of_two_vms_has_a_port_that_both_publish() -> None:
    elder, younger = vm(1, "bridge", "8080:80"), vm(2, "bridge", "8080:81")

    published = rules(younger, elder).elements[f"inet {SETTINGS.table} published"]

    assert published == {"tcp . 127.0.0.1 . 8080": "10.87.0.2 . 80"}


@pytest.mark.usefixtures("namespace")
def test_changes_give_the_same_firewall_as_the_full_ruleset() -> None:
    rng = Random(7)
    before: Rules | None = None
    for _ in range(25):
        after = rules(*many(rng))
        if text := ruleset_changes(before, after):
            nft(text)
        changed = ruleset()
        nft(full_ruleset(after))
        assert ruleset() == changed
        before = after


@pytest.mark.usefixtures("namespace")
def test_foreign_tables_stay_when_the_daemons_are_replaced_and_deleted() -> None:
    theirs = "table inet volant-9999999999 {\n\tset guests {\n\t\ttype ifname\n\t}\n}\n"
    nft(theirs)

    nft(full_ruleset(rules(vm(1, "blue", "8080:80"))))
    assert theirs in ruleset()
    nft(delete_tables(SETTINGS.tables))

    assert ruleset() == theirs
