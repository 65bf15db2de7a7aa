"""Builds the firewall of a plan as text for `nft -f`.

There are two tables. The one of the family `bridge` filters frames from and to taps. The one of the family `inet`
filters packets that the host routes or receives::

      guest ──tap──▶ from-guest ──┬─▶ between-guests ─▶ to-guest ──tap──▶ guest of the same named network
                     its own MAC  │
                     and address  └─▶ bridge ─▶ from-bridge ─▶ [routing] ─▶ to-bridge ─▶ source-nat ──▶ world
                     or nothing                 not the host                answers and
                                                nor metadata                published ports

- **A guest may send** only what matches a set of (tap, MAC, address), for ARP too. The tap drops everything else, IPv6
  and tagged frames among it. Rules match taps by the prefix of their names, as not every kernel can match a port's
  bridge.
- **Other guests' addresses behind the gateway's MAC** are dropped at the tap, too: isolated guests can't meet by way of
  the host's routing.
- **The host's own addresses**, its loopback among them, are rejected before destination NAT, so that no port that is
  published on this host is a way in. Answers to the host's own connections pass, and so does a ping of the gateway.
- **The host's other networks** are reached from its uplink as before: the daemon makes the host forward packets that
  arrive there, for the answers to guests, and drops those that would begin a connection to elsewhere. Where the host is
  a router in any case it drops none, nor those of ports that something else has published.
- **Broadcast and multicast** reach the other guests of the network, but no service of the host: they are dropped where
  the host receives packets, which bridged frames never pass.
- **DNS of VMs with an egress policy** goes to the gateway; `_egress_rules.py` leads it to their resolvers.
- **Cloud metadata services** are rejected. Their IPv6 addresses need no rule, as no IPv6 leaves a tap.
- **A port published on 127.0.0.1** is reached by packets of the host, which leave by the bridge with the gateway's
  address. The kernel allows that where `route_localnet` is on: only for the bridge, and only while such a port is
  published. The switch would also let guests send to the host's loopback, which the rule above rejects; so the rules
  are loaded first. Rejected: a process that listens on 127.0.0.1 and copies. It must be kept alive, needs CPU time for
  each byte, and its connections die with it.
- **Bridge netfilter** (`bridge-nf-call-iptables`) also passes bridged frames to the `inet` table, which lets them pass.

**Only elements of sets differ by VM.** So a VM more or less is a few elements, whose cost does not depend on the number
of VMs. `full_ruleset` replaces both tables, `ruleset_changes` changes elements; each is one transaction. A change fails
when an element that it removes is missing, because something else changed the tables; then load the full ruleset.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from ipaddress import collapse_addresses

import msgspec

from volant.model import tap_prefix
from volant.model.addresses import AZURE, METADATA

from ._plan import NetworkPlan, Tap

_CONNECTIONS = 8192
"""Maximum connections of one guest at a time, as all of the host's connections share one table."""

Elements = Mapping[str, Mapping[str, str]]


class Rules(msgspec.Struct, frozen=True):
    """A ruleset: both tables, and the elements of their sets.

    An element is a key and its value, which is empty in a set. A set's name includes its table: `bridge t guests`.
    """

    tables: tuple[str, ...]
    chains: str
    elements: Elements


def rules_of(plan: NetworkPlan, *, closed: Collection[int] = (), uplinks: Collection[str] = ()) -> Rules:
    """Returns the ruleset of a plan.

    :param closed: VMs that may send nothing, as their egress policy is not enforced
    :param uplinks: interfaces whose packets are routed only to guests
    """
    settings = plan.settings
    bridge, inet = settings.tables
    names = sorted({tap.network for tap in plan.taps if tap.network})
    elements: dict[str, dict[str, str]] = {
        f"{bridge} guests": {
            f'"{tap.name}" . {tap.mac} . {tap.address}': "" for tap in plan.taps if tap.vm_id not in closed
        },
        f"{bridge} nics": {f'"{tap.name}" . {tap.mac}': "" for tap in plan.taps},
        f"{bridge} networks": {f'"{tap.name}"': f"goto in-{tap.network}" for tap in plan.taps if tap.network},
        **{
            f"{bridge} members-{name}": {f'"{tap.name}"': "" for tap in plan.taps if tap.network == name}
            for name in names
        },
        f"{inet} asks-the-daemon": {tap.address: "" for tap in plan.taps if tap.restricted},
        f"{inet} uplinks": {f'"{name}"': "" for name in uplinks},
        f"{inet} published": _published(plan.taps, everywhere=False),
        f"{inet} published-everywhere": _published(plan.taps, everywhere=True),
    }
    return Rules(settings.tables, _bridge_table(plan, names) + _inet_table(plan), elements)


def _published(taps: tuple[Tap, ...], *, everywhere: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for tap in taps:
        for port in tap.ports:
            if (port.host == "0.0.0.0") is everywhere:
                host = "" if everywhere else f"{port.host} . "
                # If two VMs publish the same port, the older one has it.
                found.setdefault(f"{port.protocol} . {host}{port.host_port}", f"{tap.address} . {port.guest_port}")
    return found


def full_ruleset(rules: Rules) -> str:
    """Returns the text that creates or replaces both tables."""
    return delete_tables(rules.tables) + rules.chains + "".join(_all("add", name, rules) for name in rules.elements)


def delete_tables(tables: tuple[str, ...]) -> str:
    """Returns the text that deletes tables, whether they exist or not."""
    return "".join(f"add table {table}\ndelete table {table}\n" for table in tables)


def ruleset_changes(before: Rules | None, after: Rules) -> str:
    """Returns the text that changes `before` into `after`; empty if they are equal. It is the full ruleset if `before`
    is unknown or if more than elements differ."""
    if before is None or (before.tables, before.chains) != (after.tables, after.chains):
        return full_ruleset(after)
    text = ""
    for verb, mine, other in (("delete", before, after), ("add", after, before)):
        for name, elements in mine.elements.items():
            others = other.elements[name]
            text += _elements(verb, name, {key: value for key, value in elements.items() if others.get(key) != value})
    return text


def _all(verb: str, name: str, rules: Rules) -> str:
    return _elements(verb, name, rules.elements[name])


def _elements(verb: str, name: str, elements: Mapping[str, str]) -> str:
    if not elements:
        return ""
    written = (f"{key} : {value}" if value and verb == "add" else key for key, value in elements.items())
    return f"{verb} element {name} {{ {', '.join(written)} }}\n"


def _bridge_table(plan: NetworkPlan, names: list[str]) -> str:
    settings = plan.settings
    taps = f'"{tap_prefix(settings.instance)}*"'
    subnets = _set(collapse_addresses(gateway.network for gateway in plan.gateways))
    networks = "".join(
        f"""
    set members-{name} {{
        type ifname
    }}
    chain in-{name} {{
        oifname @members-{name} accept
        drop
    }}"""
        for name in names
    )
    return f"""table bridge {settings.table} {{
    set guests {{
        type ifname . ether_addr . ipv4_addr
    }}
    set nics {{
        type ifname . ether_addr
    }}
    map networks {{
        type ifname : verdict
    }}{networks}
    chain prerouting {{
        type filter hook prerouting priority filter; policy accept;
        iifname {taps} goto from-guest
    }}
    chain from-guest {{
        ether type ip ether daddr {settings.bridge_mac} ip daddr {subnets} ip daddr != {_gateways(plan)} drop
        ether type ip iifname . ether saddr . ip saddr @guests accept
        ether type arp arp htype 1 arp ptype ip jump from-guest-arp
        drop
    }}
    chain from-guest-arp {{
        iifname . ether saddr . arp saddr ip @guests iifname . arp saddr ether . arp saddr ip @guests accept
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname vmap @networks
        iifname {taps} drop
        oifname {taps} drop
    }}
    chain postrouting {{
        type filter hook postrouting priority filter; policy accept;
        oifname {taps} goto to-guest
    }}
    chain to-guest {{
        ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 accept
        oifname . ether daddr @nics accept
        drop
    }}
}}
"""


def _inet_table(plan: NetworkPlan) -> str:
    settings = plan.settings
    bridge = f'"{settings.bridge_name}"'
    published = """
        fib daddr type local dnat ip to meta l4proto . ip daddr . th dport map @published
        fib daddr type local dnat ip to meta l4proto . th dport map @published-everywhere"""
    return f"""table inet {settings.table} {{
    map published {{
        type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service
    }}
    map published-everywhere {{
        type inet_proto . inet_service : ipv4_addr . inet_service
    }}
    set asks-the-daemon {{
        type ipv4_addr
    }}
    set uplinks {{
        type ifname
    }}
    set connections {{
        type ipv4_addr
        size 65535
        flags dynamic
    }}
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        iifname {bridge} goto from-bridge
    }}
    chain from-bridge {{
        ct state established,related accept
        ct state invalid drop
        ip daddr {_gateways(plan)} icmp type echo-request accept
        ip saddr @asks-the-daemon ip daddr {_gateways(plan)} meta l4proto {{ tcp, udp }} th dport 53 accept
        fib daddr type local reject with icmpx admin-prohibited
        ip daddr {AZURE} meta l4proto {{ tcp, udp }} th dport 53 goto new-connection
        ip daddr {_set(METADATA)} reject with icmpx admin-prohibited
        goto new-connection
    }}
    chain new-connection {{
        ct state new add @connections {{ ip saddr ct count over {_CONNECTIONS} }} drop
    }}
    chain to-the-host {{
        type filter hook input priority filter; policy accept;
        iifname {bridge} fib daddr type {{ broadcast, multicast }} drop
    }}
    chain destination-nat {{
        type nat hook prerouting priority dstnat; policy accept;{published}
    }}
    chain destination-nat-of-the-host {{
        type nat hook output priority dstnat; policy accept;{published}
    }}
    chain to-bridge {{
        type filter hook forward priority filter; policy accept;
        iifname {bridge} accept
        ct state established,related accept
        ct status dnat accept
        oifname {bridge} drop
        iifname @uplinks drop
    }}
    chain source-nat {{
        type nat hook postrouting priority srcnat; policy accept;
        iifname {bridge} oifname != {bridge} masquerade
        oifname {bridge} ip saddr 127.0.0.0/8 masquerade
    }}
}}
"""


def _gateways(plan: NetworkPlan) -> str:
    return _set(gateway.ip for gateway in plan.gateways)


def _set(members: Iterable[object]) -> str:
    return f"{{ {', '.join(map(str, members))} }}"
