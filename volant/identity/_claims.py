"""Reads the claims of a token: the caller's name, and by the first rule that matches, its role and project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from hashlib import sha256

import msgspec

from volant.model import Role, parse_role_grant

Claims = Mapping[str, object]
_MAX_NAME = 100
"""Maximum length of a name, so that log lines stay readable."""


class RoleRule(msgspec.Struct, frozen=True):
    """Gives a role to tokens whose claim has a certain value."""

    claim: str
    """The name of the claim, or `a.b` for the member `b` of the object `a`."""
    pattern: str
    """The value of the claim, or one of its values if it is a list; `*` stands for any text."""
    role: Role
    project: str | None
    """None for all projects."""

    def matches(self, claims: Claims) -> bool:
        """Returns whether the rule gives its role to a token with these claims."""
        # Some issuers let people enter any address; only a verified one identifies a person.
        if self.claim == "email" and claims.get("email_verified") is not True:
            return False
        # Only `*` is special. `fnmatch` takes `[?]` and `[[]` for a plain `?` and `[`.
        pattern = self.pattern.replace("[", "[[]").replace("?", "[?]")
        return any(fnmatchcase(value, pattern) for value in _values(claims, self.claim))


def parse_role_rule(text: str) -> RoleRule:
    """Parses `CLAIM=VALUE:ROLE` or `CLAIM=VALUE:ROLE:PROJECT`; the value may have colons.

    :raises ValueError: the text has neither form, or fits both; show the message to the user.
    """
    return RoleRule(*parse_role_grant(text, form="CLAIM=VALUE", example="groups=ops:admin"))


class Grant(msgspec.Struct, frozen=True):
    """The role and project that a rule gives."""

    role: Role
    project: str | None
    version: str
    """The digest of the rule and those before it. While it is in force, the same claims give the same role."""


class RoleRules:
    """Holds the rules in force. The first that matches counts."""

    def __init__(self, rules: Sequence[RoleRule], context: object = None) -> None:
        """Creates it. `context` is any other data that grants depend on; a change of it changes all versions."""
        self._grants: list[tuple[RoleRule, Grant]] = []
        digest = sha256(repr(context).encode())
        for rule in rules:
            digest.update(msgspec.json.encode(rule))
            self._grants.append((rule, Grant(rule.role, rule.project, digest.hexdigest()[:32])))
        self._versions = {grant.version for _, grant in self._grants}

    def find(self, claims: Claims) -> Grant | None:
        """Returns the grant for claims; None if no rule matches."""
        return next((grant for rule, grant in self._grants if rule.matches(claims)), None)

    def has(self, version: str) -> bool:
        """Returns whether a grant of this version is in force."""
        return version in self._versions


def name_of(claims: Claims, claim: str) -> str:
    """Returns the name to show: the value of `claim`, otherwise the subject. Replaces control characters by `?`."""
    name = next(_values(claims, claim), None) or str(claims.get("sub", ""))
    return "".join(letter if letter.isprintable() else "?" for letter in name[:_MAX_NAME])


def _values(claims: Claims, name: str) -> Iterator[str]:
    found: object = claims.get(name)
    if found is None:
        found = claims
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, str):
        yield found
    elif isinstance(found, list):
        yield from (value for value in found if isinstance(value, str))
