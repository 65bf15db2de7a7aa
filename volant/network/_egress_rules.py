"""Builds the firewall of VMs with an egress policy as text for `nft -f`.

It is a separate table, `inet volant-‹digest›-egress`, next to those of `_rules.py` and `_passt_filter.py`. Each of them
can refuse a packet, so this one only adds restrictions: the host stays closed whatever the rules of a VM allow::

      guest ──bridge──▶ from-bridge: ip saddr vmap @policies  ─▶ vm-7 ─┬─▶ accept: established, DNS, rules, @names-7-0
      passt ──output──▶ from-passt:  meta skuid vmap @users   ─▶ vm-8  └─▶ @denied-7, counter, reject

- **A VM is known** by its address, which the table of the family `bridge` has checked, or by the user of its passt.
- **A connection that is established goes on**, also when the address of its name is not allowed any more. The chain of
  a VM decides only about packets that begin one.
- **DNS** goes to the guest's gateway, port 53, and is translated to the daemon's resolver for this VM. A new
  connection to a resolver that was not translated here is dropped.
- **The addresses of names** are elements of sets with a timeout, a set for each combination of protocol and ports.
- **Members of the same named network** are reached whatever the policy, as their frames are not routed. Where the host
  filters bridged frames here, too (`bridge-nf-call-iptables`), they are let through.
- **A denied connection** is counted, and its destination is an element of a set for `_DENIED_S`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from volant.model import Egress as Policy, EgressRule, port_ranges, rules_of_egress

from ._plan import NetworkSettings
from ._rules import delete_tables

DNS_PORT = 53
_NAMES = 4096
"""Maximum addresses in one set, well above the number that a resolver adds."""
_DENIED = 64
"""Maximum denied destinations stored per VM."""
_DENIED_S = 600
"""How long a denied destination is stored after its last packet."""

Addresses = Mapping[str, float]
"""Addresses, each with the seconds for which it is allowed."""


class EgressGuest(msgspec.Struct, frozen=True, kw_only=True):
    """The data of one VM for the firewall."""

    vm_id: int
    egress: Policy
    gateway: str
    """Its DNS server."""
    address: str = ""
    """Its address on the bridge; empty with the network `user`."""
    subnet: str = ""
    """The subnet of its named network; empty if it has no other members to reach."""
    user: int | None = None
    """The user of its passt; None on the bridge."""

    @property
    def listens_at(self) -> str:
        """The host's address at which its resolver listens."""
        return self.gateway if self.address else "127.0.0.1"


class EgressState(msgspec.Struct, frozen=True, kw_only=True):
    """The variable state of one VM while its rules stay."""

    port: int
    """The port of its resolver; 0 if it has none now."""
    allowed: Mapping[str, Addresses] = {}
    """The addresses of its names, by set."""
    denied: tuple[int, int] = (0, 0)
    """Denied packets and bytes."""


def sets_of(guest: EgressGuest) -> dict[str, tuple[EgressRule, ...]]:
    """Returns the sets of a VM's names, each with the rules whose addresses are in it."""
    by_ports: dict[object, list[EgressRule]] = {}
    for rule in rules_of_egress(guest.egress):
        if rule.name is not None:
            by_ports.setdefault((rule.protocols, rule.ports), []).append(rule)
    return {f"names-{guest.vm_id}-{number}": tuple(rules) for number, rules in enumerate(by_ports.values())}


def denied_set(vm_id: int) -> str:
    """Returns the name of a VM's set of denied destinations."""
    return f"denied-{vm_id}"


def counter_name(vm_id: int) -> str:
    """Returns the name of a VM's counter of denied connections."""
    return f"denied-{vm_id}"


def egress_ruleset(
    settings: NetworkSettings, guests: Iterable[tuple[EgressGuest, EgressState]], users: range = range(0)
) -> str:
    """Returns the text that creates or replaces the table.

    :param users: the users of passts of VMs with a policy; one that is not among `guests` may begin no connection
    """
    others = f"meta skuid {users[0]}-{users[-1]} ct state new reject with icmpx admin-prohibited" if users else ""
    table = settings.egress_table
    bridge = f'"{settings.bridge_name}"'
    dns = f"meta l4proto {{ tcp, udp }} th dport {DNS_PORT}"
    return f"""{delete_tables((table,))}table {table} {{
    map policies {{
        type ipv4_addr : verdict
    }}
    map users {{
        type uid : verdict
    }}
    map resolvers {{
        type ipv4_addr . ipv4_addr : ipv4_addr . inet_service
    }}
    map resolvers-of-users {{
        type uid . ipv4_addr : ipv4_addr . inet_service
    }}
    set resolver-ports {{
        type ipv4_addr . inet_service
    }}
    chain prerouting {{
        type filter hook prerouting priority mangle + 1; policy accept;
        iifname {bridge} goto from-bridge
    }}
    chain from-bridge {{
        ip saddr vmap @policies
    }}
    chain output {{
        type filter hook output priority mangle + 1; policy accept;
        meta skuid vmap @users
        {others}
    }}
    chain to-resolvers {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname {bridge} {dns} dnat ip to ip saddr . ip daddr map @resolvers
    }}
    chain to-resolvers-of-users {{
        type nat hook output priority dstnat; policy accept;
        {dns} dnat ip to meta skuid . ip daddr map @resolvers-of-users
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        meta l4proto {{ tcp, udp }} ip daddr . th dport @resolver-ports ct state new ct status & dnat == 0 drop
    }}
}}
{"".join(added(settings, guest, state) for guest, state in guests)}"""


def added(settings: NetworkSettings, guest: EgressGuest, state: EgressState) -> str:
    """Returns the text that adds a VM's rules."""
    table, chain = settings.egress_table, _chain(guest)
    packets, size = state.denied
    text = f"add counter {table} {counter_name(guest.vm_id)} {{ packets {packets} bytes {size} }}\n"
    text += (
        f"add set {table} {denied_set(guest.vm_id)} {{ type ipv4_addr . inet_proto . inet_service; "
        f"flags dynamic,timeout; size {_DENIED}; timeout {_DENIED_S}s; }}\n"
    )
    for name in sets_of(guest):
        text += f"add set {table} {name} {{ type ipv4_addr; flags timeout; size {_NAMES}; }}\n"
        text += allowed(settings, name, state.allowed.get(name, {}))
    text += f"add chain {table} {chain}\n"
    text += "".join(f"add rule {table} {chain} {rule}\n" for rule in _rules(guest, state.port))
    text += "".join(f"add element {table} {name} {{ {element} }}\n" for name, element in _elements(guest, state.port))
    return text


def removed(settings: NetworkSettings, guest: EgressGuest, port: int) -> str:
    """Returns the text that removes the result of `added`. `port` is the port of the VM's resolver."""
    table = settings.egress_table
    text = "".join(
        f"delete element {table} {name} {{ {element.partition(' : ')[0]} }}\n"
        for name, element in _elements(guest, port)
    )
    text += f"flush chain {table} {_chain(guest)}\ndelete chain {table} {_chain(guest)}\n"
    text += "".join(f"delete set {table} {name}\n" for name in (*sets_of(guest), denied_set(guest.vm_id)))
    return text + f"delete counter {table} {counter_name(guest.vm_id)}\n"


def allowed(settings: NetworkSettings, name: str, addresses: Addresses) -> str:
    """Returns the text that allows addresses in a set of names, each for its seconds from now."""
    if not addresses:
        return ""
    table = settings.egress_table
    elements = ", ".join(addresses)
    timed = ", ".join(f"{address} timeout {max(1, round(seconds))}s" for address, seconds in addresses.items())
    # Adding an element that is there does not change its timeout. It has to be there to be deleted.
    return (
        f"add element {table} {name} {{ {elements} }}\ndelete element {table} {name} {{ {elements} }}\n"
        f"add element {table} {name} {{ {timed} }}\n"
    )


def _chain(guest: EgressGuest) -> str:
    return f"vm-{guest.vm_id}"


def _elements(guest: EgressGuest, port: int) -> list[tuple[str, str]]:
    """Returns the elements of a VM in the sets and maps of all VMs."""
    resolver = f"{guest.gateway} : {guest.listens_at} . {port}"
    if guest.user is not None:
        of_resolver, policy = ("resolvers-of-users", f"{guest.user} . {resolver}"), ("users", str(guest.user))
    else:
        of_resolver, policy = ("resolvers", f"{guest.address} . {resolver}"), ("policies", guest.address)
    found = [(policy[0], f"{policy[1]} : goto {_chain(guest)}")]
    return [*found, of_resolver, ("resolver-ports", f"{guest.listens_at} . {port}")] if port else found


def _rules(guest: EgressGuest, port: int) -> Iterable[str]:
    yield "ct state established,related accept"
    # Without a resolver, a service of the host would get the queries, if a rule allowed the gateway's network.
    verdict = "accept" if port else "reject with icmpx admin-prohibited"
    yield f"ip daddr {guest.gateway} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} {verdict}"
    if guest.address:
        # The other table answers what else is sent to the host.
        yield f"ip daddr {guest.gateway} icmp type echo-request accept"
    if guest.subnet:
        yield f"ip daddr {guest.subnet} ip daddr != {guest.gateway} accept"
    yield "fib daddr type { broadcast, multicast } drop"
    for rule in rules_of_egress(guest.egress):
        if rule.cidr is not None:
            yield f"ip daddr {rule.cidr}{_match(rule)} accept"
    for name, rules in sets_of(guest).items():
        yield f"ip daddr @{name}{_match(rules[0])} accept"
    yield f"meta l4proto {{ tcp, udp }} update @{denied_set(guest.vm_id)} {{ ip daddr . meta l4proto . th dport }}"
    yield f"counter name {counter_name(guest.vm_id)}"
    yield "reject with icmpx admin-prohibited"


def _match(rule: EgressRule) -> str:
    """Returns the match of protocol and ports, with a leading space."""
    protocols = f" meta l4proto {{ {', '.join(rule.protocols)} }}" if rule.protocols else ""
    ranges = [f"{first}-{last}" if first != last else str(first) for first, last in _merged(rule)]
    return f"{protocols} th dport {{ {', '.join(ranges)} }}" if ranges else protocols


def _merged(rule: EgressRule) -> list[tuple[int, int]]:
    """Returns ranges of ports that don't overlap, as required by nftables."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(port_ranges(rule)):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
