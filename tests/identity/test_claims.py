"""Claims of tokens become roles: the first rule that matches counts."""

from __future__ import annotations

from typing import Any

import pytest

from volant.identity._claims import RoleRules, name_of, parse_role_rule
from volant.model import Role


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("groups=ops:admin", ("groups", "ops", Role.ADMIN, None)),
        (" groups=web:operator:web ", ("groups", "web", Role.OPERATOR, "web")),
        ("groups=admin:admin", ("groups", "admin", Role.ADMIN, None)),
        ("sub=ci-*:user", ("sub", "ci-*", Role.USER, "default")),
        ("sub=repo:org/x:ref:operator:web", ("sub", "repo:org/x:ref", Role.OPERATOR, "web")),
        ("https://a.example/roles=x=y:viewer", ("https://a.example/roles", "x=y", Role.VIEWER, "default")),
    ],
)
def test_a_rule_names_a_claim_a_value_a_role_and_a_project(text: str, expected: tuple[Any, ...]) -> None:
    rule = parse_role_rule(text)
    assert (rule.claim, rule.pattern, rule.role, rule.project) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("groups:admin", "is not CLAIM=VALUE"),
        ("=ops:admin", "is not CLAIM=VALUE"),
        ("groups=:admin", "is not CLAIM=VALUE"),
        ("groups=ops", "is not CLAIM=VALUE"),
        ("groups=ops:root", "is not CLAIM=VALUE"),
        ("groups=ops:user:", "is not CLAIM=VALUE"),
        ("groups=ops:admin:web", "an admin has all projects"),
        ("groups=ops:operator:user", "two ways"),
    ],
)
def test_a_rule_that_says_something_else_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_role_rule(text)


@pytest.mark.parametrize(
    ("rule", "claims", "is_match"),
    [
        ("groups=ops:user", {"groups": ["web", "ops"]}, True),
        ("groups=ops:user", {"groups": "ops"}, True),
        ("groups=ops:user", {"groups": ["ops2", "Ops", " ops"]}, False),
        ("groups=ops:user", {"groups": "web ops"}, False),
        ("groups=ops:user", {}, False),
        ("groups=1:user", {"groups": [1, None, {}]}, False),
        ("groups=*:user", {"groups": []}, False),
        ("sub=ci-*:user", {"sub": "ci-7"}, True),
        ("sub=ci-*:user", {"sub": "x-ci-7"}, False),
        ("sub=ci-?:user", {"sub": "ci-7"}, False),
        ("sub=[a]:user", {"sub": "a"}, False),
        ("sub=[a]:user", {"sub": "[a]"}, True),
        ("realm.roles=ops:user", {"realm": {"roles": ["ops"]}}, True),
        ("realm.roles=ops:user", {"realm.roles": ["ops"]}, True),
        ("realm.roles=ops:user", {"realm": ["roles"]}, False),
        ("email=*@a.example:user", {"email": "x@a.example"}, False),
        ("email=*@a.example:user", {"email": "x@a.example", "email_verified": "true"}, False),
        ("email=*@a.example:user", {"email": "x@a.example", "email_verified": True}, True),
    ],
)
def test_a_rule_matches_one_value_of_its_claim(rule: str, claims: dict[str, Any], is_match: bool) -> None:
    assert parse_role_rule(rule).matches(claims) is is_match


def test_the_first_rule_that_matches_counts() -> None:
    rules = RoleRules([parse_role_rule("groups=web:viewer"), parse_role_rule("groups=*:admin")])
    both = rules.find({"groups": ["ops", "web"]})
    other = rules.find({"groups": ["ops"]})
    assert both is not None
    assert other is not None
    assert (both.role, other.role) == (Role.VIEWER, Role.ADMIN)
    assert rules.find({"sub": "ann"}) is None


def test_a_grant_ends_when_its_rule_or_one_before_it_changes() -> None:
    first, second, third = (parse_role_rule(f"groups={name}:viewer") for name in ("a", "b", "c"))
    grant = RoleRules([first, second]).find({"groups": ["b"]})
    assert grant is not None
    assert RoleRules([first, second, third]).has(grant.version)
    assert not RoleRules([second]).has(grant.version)
    assert not RoleRules([third, first, second]).has(grant.version)
    assert not RoleRules([first, parse_role_rule("groups=b:user")]).has(grant.version)
    assert not RoleRules([first, second], "another issuer").has(grant.version)


def test_a_name_is_the_claim_or_the_subject_without_control_characters() -> None:
    assert name_of({"sub": "1", "email": "ann@a.example"}, "email") == "ann@a.example"
    assert name_of({"sub": "1"}, "email") == "1"
    assert name_of({"sub": "a\x1b[2J\nb"}, "sub") == "a?[2J?b"
    assert len(name_of({"sub": "a" * 255}, "sub")) == 100
