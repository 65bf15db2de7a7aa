"""Egress: which destinations a VM may open connections to.

`choose_egress` is the one place that decides the policy of a new VM; its row keeps it, and copies inherit it. It must
be within the policy of the VM's project.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, Literal

import msgspec

from ._problem import Problem, contradictory, invalid

EGRESS_NONE: Literal["none"] = "none"
EGRESS_ALL: Literal["all"] = "all"
MAX_RULES = 64
"""Maximum rules per VM. Each is a firewall rule."""
MAX_PORTS_IN_RULE = 16
"""Maximum ports and ranges in one rule."""
_MAX_NAME = 253

_LABEL = "[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME_RULE = rf"^(\*\.)?{_LABEL}(\.{_LABEL})*$"
_BYTE = "(0|[1-9][0-9]?|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_CIDR_RULE = rf"^{_BYTE}(\.{_BYTE}){{3}}(/([0-9]|[12][0-9]|3[0-2]))?$"
_CIDR = re.compile(_CIDR_RULE.rstrip("$") + r"\Z")
_NAME = re.compile(_NAME_RULE.rstrip("$") + r"\Z")
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?\Z")
_TEXT = re.compile(r"(?P<target>[0-9.]+(?:/[0-9]+)?|[^/:\s]+)(?::(?P<ports>[0-9,-]+))?(?:/(?P<protocol>[a-z]+))?\Z")

Protocol = Literal["tcp", "udp"]
PortOrRange = (
    Annotated[int, msgspec.Meta(ge=1, le=65535)]
    | Annotated[str, msgspec.Meta(extra_json_schema={"pattern": rf"^{_PORT}(-{_PORT})?$"})]
)


class EgressRule(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """A destination that a VM may open connections to: an IPv4 network, or the addresses of a DNS name."""

    cidr: Annotated[str, msgspec.Meta(extra_json_schema={"pattern": _CIDR_RULE})] | None = None
    """An IPv4 network or one address. Excludes `name`."""
    name: Annotated[str, msgspec.Meta(extra_json_schema={"pattern": _NAME_RULE, "maxLength": _MAX_NAME})] | None = None
    """A DNS name, or `*.` and a name for all names below it. Excludes `cidr`."""
    ports: Annotated[tuple[PortOrRange, ...], msgspec.Meta(extra_json_schema={"maxItems": MAX_PORTS_IN_RULE})] = ()
    """Ports and ranges of ports, such as `443` and `"8000-8010"`; empty for all ports."""
    protocol: Protocol | None = None
    """Defaults to TCP if the rule has ports, otherwise to all protocols."""

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """The allowed protocols; empty for all."""
        if self.protocol is not None:
            return (self.protocol,)
        return ("tcp",) if self.ports else ()

    def __str__(self) -> str:
        ports = f":{','.join(map(str, self.ports))}" if self.ports else ""
        protocol = f"/{self.protocol}" if self.protocol else ""
        return f"{self.cidr or self.name}{ports}{protocol}"

    def matches(self, name: str) -> bool:
        """Returns whether the rule matches a DNS name, given in lower case and without a final dot."""
        if self.name is None:
            return False
        return name.endswith(self.name[1:]) if self.name.startswith("*.") else name == self.name


def _with(member: str) -> dict[str, object]:
    """Returns the schema of an object in which a member is required and not null."""
    return {"required": [member], "properties": {member: {"type": "string"}}}


Egress = Literal["none", "all"] | tuple[EgressRule, ...]
"""`none`, `all`, or rules. A destination that no rule allows is denied."""

EgressRequest = (
    Literal["none", "all"]
    | Annotated[
        tuple[
            Annotated[
                EgressRule,
                msgspec.Meta(extra_json_schema={"oneOf": [_with("cidr"), _with("name")]}),
            ],
            ...,
        ],
        msgspec.Meta(extra_json_schema={"minItems": 1, "maxItems": MAX_RULES}),
    ]
)
"""The policy as clients write it. Only the schema differs."""


def choose_egress(
    requested: EgressRequest | None, *, project: Egress = EGRESS_ALL, connected: bool, reason: str
) -> Egress:
    """Decides the policy of a new VM.

    :param requested: None for the project's policy
    :param project: the policy of its project, which is not checked here to cover the requested one
    :param connected: whether the VM has a network; `reason` says why
    :raises Problem: 400, a rule is malformed; 422, there are rules and no network.
    """
    if requested is None:
        return project if connected or not is_restricted(project) else EGRESS_NONE
    egress = parse_egress(requested)
    if not connected and isinstance(egress, tuple):
        raise contradictory(
            "egress",
            f"egress has {len(egress)} rules, and the VM has no network ({reason})",
            hint="set `network` to `bridge`, `user`, or the name of a network",
        )
    return egress


def parse_egress(requested: EgressRequest, field: str = "egress") -> Egress:
    """Returns the policy with its rules in their usual spelling. :raises Problem: 400 that names the rule."""
    if isinstance(requested, str):
        return requested
    if not 1 <= len(requested) <= MAX_RULES:
        raise invalid(
            field,
            f"{field} has {len(requested)} rules, and from 1 to {MAX_RULES} are possible",
            hint="`none` allows no connection",
        )
    return tuple(_parse_rule(rule, f"{field}[{number}]") for number, rule in enumerate(requested))


def parse_egress_texts(texts: Sequence[str], field: str = "egress") -> Egress:
    """Parses `none`, `all`, or rules in the form `TARGET[:PORTS][/tcp|udp]`. :raises Problem: 400."""
    if len(texts) == 1:
        if texts[0] == EGRESS_NONE:
            return EGRESS_NONE
        if texts[0] == EGRESS_ALL:
            return EGRESS_ALL
    return parse_egress(tuple(_parse_text(text, field) for text in texts), field)


def egress_text(egress: Egress) -> str:
    """Returns the policy as text."""
    return egress if isinstance(egress, str) else ", ".join(map(str, egress))


def is_restricted(egress: Egress) -> bool:
    """Returns whether the policy denies anything."""
    return egress != EGRESS_ALL


def covers(outer: Egress, inner: Egress) -> bool:
    """Returns whether `outer` allows everything that `inner` allows: each rule of `inner` is within one rule of
    `outer`."""
    if outer == EGRESS_ALL or inner == EGRESS_NONE:
        return True
    if inner == EGRESS_ALL:
        return False
    limits = rules_of_egress(outer)
    return all(any(_covers(limit, rule) for limit in limits) for rule in rules_of_egress(inner))


def _covers(outer: EgressRule, inner: EgressRule) -> bool:
    if outer.protocols and not (inner.protocols and set(inner.protocols) <= set(outer.protocols)):
        return False
    if outer.ports:
        allowed = tuple(port_ranges(outer))
        wanted = tuple(port_ranges(inner))
        if not wanted or not all(any(a <= first and last <= b for a, b in allowed) for first, last in wanted):
            return False
    if inner.name is not None:
        # `*.a.b` is within `*.b`, as all names below `a.b` are below `b`.
        return outer.name == inner.name or outer.matches(inner.name)
    if outer.cidr is None or inner.cidr is None:
        return False
    return IPv4Network(inner.cidr).subnet_of(IPv4Network(outer.cidr))


def rules_of_egress(egress: Egress) -> tuple[EgressRule, ...]:
    """Returns the rules, none for `none`. Must not be called for `all`."""
    return () if isinstance(egress, str) else egress


def port_ranges(rule: EgressRule) -> Iterator[tuple[int, int]]:
    """Yields the first and the last port of each range of a parsed rule."""
    for ports in rule.ports:
        first, _, last = str(ports).partition("-")
        yield int(first), int(last or first)


def egress_unavailable(obstacle: str, *, vm: str) -> Problem:
    """Returns the 503 for a host that can't filter the VM's traffic."""
    return Problem(
        503,
        "egress-unavailable",
        f"VM {vm!r} can't have egress rules: {obstacle}",
        field="egress",
        vm=vm,
        hint="remove the obstacle and restart the daemon, use another network, or create the VM with egress `all`",
    )


def _parse_text(text: str, field: str) -> EgressRule:
    match = _TEXT.match(text)
    if text in (EGRESS_NONE, EGRESS_ALL):
        raise invalid(field, f"{field} has {text!r} beside rules", hint=f"give `{text}` alone, or only rules")
    if match is None or match["protocol"] not in (None, "tcp", "udp"):
        raise invalid(
            field,
            f"{field} has {text[:80]!r}, which is not TARGET[:PORTS][/tcp|udp]",
            hint="use for example mirror.example.org:443, *.example.com:443,8000-8010 or 10.0.0.0/8:5432/tcp",
        )
    target, protocol = match["target"], match["protocol"]
    is_cidr = target[0].isdigit() and not target.strip("0123456789./")
    return EgressRule(
        cidr=target if is_cidr else None,
        name=None if is_cidr else target,
        ports=tuple(match["ports"].split(",")) if match["ports"] else (),
        protocol=None if protocol is None else "udp" if protocol == "udp" else "tcp",
    )


def _parse_rule(rule: EgressRule, field: str) -> EgressRule:
    if (rule.cidr is None) == (rule.name is None):
        raise invalid(
            field, f"{field} must have either `cidr` or `name`, and has {'none' if rule.cidr is None else 'both'}"
        )
    if len(rule.ports) > MAX_PORTS_IN_RULE:
        raise invalid(f"{field}.ports", f"{field}.ports has {len(rule.ports)} members, at most {MAX_PORTS_IN_RULE}")
    return EgressRule(
        cidr=None if rule.cidr is None else _parse_cidr(rule.cidr, f"{field}.cidr"),
        name=None if rule.name is None else _parse_name(rule.name, f"{field}.name"),
        ports=tuple(_parse_ports(ports, f"{field}.ports") for ports in rule.ports),
        protocol=rule.protocol,
    )


def _parse_cidr(text: str, field: str) -> str:
    if _CIDR.match(text) is None:
        what = "is IPv6, which guests don't have" if ":" in text else "is not an IPv4 network"
        raise invalid(field, f"{field} {text[:60]!r} {what}", hint="use for example 10.0.0.0/8")
    network = IPv4Network(text, strict=False)
    if str(network.network_address) != text.partition("/")[0]:
        raise contradictory(
            field,
            f"{field} {text!r} is not the first address of a network",
            hint=f"use {network}, or {text.partition('/')[0]} for the one address",
        )
    return str(network)


def _parse_name(text: str, field: str) -> str:
    name = text.lower().removesuffix(".")
    if len(name) > _MAX_NAME or _NAME.match(name) is None:
        raise invalid(
            field,
            f"{field} {text[:80]!r} is not a DNS name, and not `*.` and one",
            hint="use for example mirror.example.org or *.example.com; write other letters as punycode (xn--)",
        )
    try:
        IPv4Address(name)
    except ValueError:
        return name
    raise contradictory(field, f"{field} {text!r} is an address", hint="write it as `cidr`")


def _parse_ports(ports: int | str, field: str) -> int | str:
    match = _RANGE.match(str(ports))
    first, last = (int(match[1]), int(match[2] or match[1])) if match is not None else (0, 0)
    if not (1 <= first <= 65535 and 1 <= last <= 65535):
        raise invalid(
            field,
            f"{field} has {str(ports)[:40]!r}, which is no port and no range of ports",
            hint='use 443 or "8000-8010"',
        )
    if first > last:
        raise contradictory(field, f"{field} has {ports!r}, which ends before it begins", hint=f'use "{last}-{first}"')
    return first if first == last else f"{first}-{last}"
