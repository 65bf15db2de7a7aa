"""Names of VMs, snapshots and volumes, of which other hosts may have some."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from volant.model import Key, Movable


class Names(Protocol):
    """Says which names new things of one kind may have on this host."""

    def claimed(self, keys: Sequence[Key], movable: Movable | None = None) -> AbstractAsyncContextManager[None]:
        """Holds names for what the block makes, and frees those of what is not there at its end.

        :param movable: how another host may start it, if this one dies; None: none ever does
        :raises Problem: 409 another host has one; 503 that can't be found out.
        """

    async def free(self, key: Key) -> None:
        """Frees the name of something that is gone."""

    def elsewhere(self, project: str) -> Collection[str] | None:
        """Returns the names in a project that other hosts have; None: there are no other hosts."""


class OwnNames(Names):
    """The names of a host that is in no fleet: its journal gives them."""

    def claimed(self, keys: Sequence[Key], movable: Movable | None = None) -> AbstractAsyncContextManager[None]:
        del keys, movable
        return nullcontext()

    async def free(self, key: Key) -> None:
        pass

    def elsewhere(self, project: str) -> Collection[str] | None:
        del project
        return None


OWN_NAMES: Mapping[str, Names] = dict.fromkeys(("vms", "snapshots", "volumes"), OwnNames())
"""Those of a host that is in no fleet, by how paths name what has them."""
