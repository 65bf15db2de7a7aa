"""What each host uses of the definitions, and which keys of secrets it has: what others have to know before they
remove a definition or encrypt a secret."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping

import msgspec

from ._interface import Entry, KeyValues, put
from ._mirror import Mirror

USAGE = "usage/"


class Usage(msgspec.Struct, frozen=True):
    """What a host says of itself."""

    uses: tuple[str, ...] = ()
    """The places of definitions."""
    secret_keys: tuple[str, ...] = ()
    """What identifies the keys that it has. It says nothing of the keys."""


class Usages:
    """The usage of all hosts, and that of this one.

    :param uses: returns the places of the definitions that this host uses
    :param secret_keys: returns what identifies the keys of secrets that it has
    """

    def __init__(
        self,
        etcd: KeyValues,
        mirror: Mirror,
        host: str,
        *,
        uses: Callable[[], Collection[str]],
        secret_keys: Callable[[], Awaitable[Collection[str]]],
    ) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._host = host
        self._uses = uses
        self._secret_keys = secret_keys

    async def here(self) -> Usage:
        """Returns that of this host."""
        return Usage(tuple(sorted(self._uses())), tuple(sorted(await self._secret_keys())))

    async def report(self) -> Usage:
        """Lets the others know it; returns it. :raises EtcdError:"""
        usage = await self.here()
        if _usage_of(self._mirror.section("usage").get(self._host)) != usage:
            await self._etcd.transact([], [put(USAGE + self._host, msgspec.json.encode(usage))])
        return usage

    def elsewhere(self) -> Mapping[str, Usage]:
        """Returns that of the other hosts, by name. Hosts that were never heard of use nothing and have no key."""
        entries = self._mirror.section("usage")
        others = [name for name in self._mirror.section("hosts") if name != self._host]
        return {name: _usage_of(entries.get(name)) or Usage() for name in sorted(others)}


def _usage_of(entry: Entry | None) -> Usage | None:
    try:
        return None if entry is None else msgspec.json.decode(entry.value, type=Usage)
    except (msgspec.MsgspecError, ValueError):
        return None
