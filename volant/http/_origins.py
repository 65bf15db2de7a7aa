"""Origins of their own for servers in guests: `{port}-{id}.localhost`, or below a name of `*.` in `allowed_hosts`.

A browser keeps origins apart: scripts, cookies and storage of one server in a guest are neither those of the daemon nor
those of another guest. The id of a VM is never used again, so what a browser has kept of one VM (a service worker, say)
is never in another one's way. A name in place of the id only leads there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

LOCAL = "localhost"
"""Names below it lead browsers to loopback (RFC 6761, 6.3)."""
ANY_BELOW = "*."

_HOST = re.compile(
    r"(?P<port>[1-9][0-9]{0,4})-(?P<vm>[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)"
    r"\.(?P<domain>(?P<name>[^:]+)(:(?P<ours>[0-9]{0,5}))?)\Z"
)


class PortOrigin(msgspec.Struct, frozen=True):
    """A port of a VM, as the `Host` of a request names it."""

    port: int
    vm: str
    """The VM's id, or a name."""
    domain: str
    """What follows, such as `localhost:7777`."""


def domains_of(allowed_hosts: Iterable[str]) -> frozenset[str]:
    """Returns the names below which ports have origins."""
    return frozenset({LOCAL, *(name.removeprefix(ANY_BELOW) for name in allowed_hosts if name.startswith(ANY_BELOW))})


def parse_port_origin(host: str, domains: frozenset[str]) -> PortOrigin | None:
    """Returns the port of a VM that a `Host` in lower case names; None: it is something else."""
    found = _HOST.match(host)
    if found is None or found["name"] not in domains or max(int(found["port"]), int(found["ours"] or 0)) > 65535:
        return None
    return PortOrigin(int(found["port"]), found["vm"], found["domain"])
