"""The names of a host's VMs, snapshots and volumes, each of which one host of the fleet has.

A name is claimed before the VM is made, and freed after it is gone. A daemon that dies in between leaves a claim
without a VM, and a restored database may bring back VMs whose claims are gone: `Names.keep` sets both right.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import msgspec
import trio

from volant.concurrency import Backoff
from volant.model import MOVED, Failover, Key, Movable, Problem, already_exists, name_taken

from ._claims import Claim, Claims, NameTaken, claim_of
from ._interface import EtcdError, KeyValues
from ._mirror import Mirror

_LOOK_S = 5.0
_PAUSE_S = 1.0
"""Between two looks, however much changes: each decodes all claims of the fleet."""
_RETRY_S, _RETRY_MAX_S = 0.5, 10.0
_FREE_S = 5.0
_FIND_S = 3.0
_CONTINUES_S = 10.0
"""For so long a request waits for a VM that is between two hosts: usually a fraction of a second."""
_LOOK_AGAIN_S, _LOOK_AGAIN_MAX_S = 0.05, 0.5
_ANOTHER = "choose another name, or delete that one first; it may be on another host"
_TAKEN: Mapping[str, Callable[[str], Problem]] = {
    "vms": name_taken,
    "snapshots": lambda name: already_exists("snapshot", name, _ANOTHER),
    "volumes": lambda name: already_exists("volume", name, _ANOTHER),
}
KINDS = tuple(_TAKEN)
"""What has names that are unique in the fleet, as paths name it."""
_logger = logging.getLogger("volant.fleet")


class Names:
    """Claims and frees names of one kind for one host.

    :param there: returns what this host has of it
    :param new_id: makes up an id that was never used
    :param is_unsure: returns whether another host may have it, although etcd does not say so
    """

    def __init__(
        self,
        etcd: KeyValues,
        mirror: Mirror,
        host: str,
        kind: str,
        *,
        there: Callable[[], Collection[Key]],
        new_id: Callable[[], str],
        is_unsure: Callable[[Key], bool] = lambda key: False,
    ) -> None:
        self._is_unsure = is_unsure
        self._claims = Claims(etcd, host, kind)
        self._mirror = mirror
        self._host = host
        self._kind = kind
        self._there = there
        self._new_id = new_id
        self._in_hand: dict[str, trio.Event] = {}
        """Names that are being claimed or freed, each by one task."""
        self.conflicts: tuple[str, ...] = ()
        """What this host has under names that other hosts have, as `project/name`."""

    def owner(self, vm: Key) -> str | None:
        """Returns the host that has a name, as far as is known; None: no host."""
        return self._host if vm in self._there() else self.owner_of(text_of(vm))

    def owner_of(self, name: str) -> str | None:
        """Returns the host that has claimed `PROJECT/NAME`."""
        claim = self._claim_of(name)
        return None if claim is None else claim.owner

    def claim(self, vm: Key) -> Claim | None:
        """Returns the claim of a name, as far as is known; None: there is none."""
        return self._claim_of(text_of(vm))

    async def find(self, vm: Key) -> str | None:
        """Returns the host that has a name; None: no host. What is not known here may be new, so etcd is asked for it.
        A VM that another host is about to start or to continue is waited for a while.

        :raises Problem: 503 etcd does not answer, so nobody can say that there is no such name; or its VM is being
            started by a host that has just taken it over, and that takes longer.
        """
        waits_until = trio.current_time() + _CONTINUES_S
        backoff = Backoff(_LOOK_AGAIN_S, _LOOK_AGAIN_MAX_S)
        while True:
            if vm in self._there():
                return self._host
            claim = await self._look_up(text_of(vm))
            if claim is None or not claim.taking:
                return None if claim is None else claim.owner
            if trio.current_time() >= waits_until:
                is_moved = claim.snapshot.startswith(MOVED)
                text = f"the host {claim.owner!r} is taking {vm.name!r} over from one that is gone"
                if is_moved:
                    text = f"{vm.name!r} has moved to the host {claim.owner!r}, which is about to continue it"
                raise Problem(503, "vm-moving", text, vm=vm.name, hint="try again", retry_after_s=1)
            await backoff.pause()

    async def _look_up(self, name: str) -> Claim | None:
        """Returns the claim of a name that this host does not have. :raises Problem: 503 etcd does not answer"""
        claim = self._claim_of(name)
        if claim is not None and claim.owner != self._host:
            return claim
        # What is known here may be old.
        try:
            with trio.fail_after(_FIND_S):
                return await self._claims.get(name)
        except EtcdError as error:
            raise unavailable(error) from error
        except trio.TooSlowError:
            raise unavailable(f"etcd has not answered within {_FIND_S:g} s") from None

    def of(self, host: str) -> Sequence[str]:
        """Returns the names that a host has, each as `PROJECT/NAME`."""
        return [name for name in self._mirror.section(self._kind) if self.owner_of(name) == host]

    @asynccontextmanager
    async def claimed(self, vms: Sequence[Key], movable: Movable | None = None) -> AsyncIterator[None]:
        """Claims names for the VMs that the block makes; frees those of VMs that are not there at its end.

        :param movable: how another host may start it
        :raises Problem: 409 a name is taken; 503 etcd does not answer.
        """
        async with self._holding(vms):
            try:
                for vm in vms:
                    if vm not in self._there():
                        await self._claim(vm, movable)
                yield
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _FREE_S):
                    for vm in vms:
                        await self._free_unless_there(vm)

    def elsewhere(self, project: str) -> Collection[str]:
        """Returns the names that other hosts have in a project, as far as is known."""
        begin = f"{project}/"
        return {
            name.removeprefix(begin)
            for name in self._mirror.section(self._kind)
            if name.startswith(begin) and self.owner_of(name) != self._host
        }

    async def free(self, vm: Key) -> None:
        """Frees the name of a VM that is gone. What etcd does not answer in time, `keep` does later."""
        with trio.move_on_after(_FREE_S):
            async with self._holding([vm]):
                await self._free_unless_there(vm)

    @asynccontextmanager
    async def _holding(self, vms: Sequence[Key]) -> AsyncIterator[None]:
        """Lets nobody else on this host claim or free these names."""
        names = sorted({text_of(vm) for vm in vms})
        held: list[str] = []
        try:
            for name in names:
                while name in self._in_hand:
                    await self._in_hand[name].wait()
                self._in_hand[name] = trio.Event()
                held.append(name)
            yield
        finally:
            for name in held:
                self._in_hand.pop(name).set()

    async def keep(self) -> None:
        """Claims the names of VMs that have none, and frees those without a VM, until cancelled."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        seen = 0
        while True:
            if self._mirror.revision == seen:
                with trio.move_on_after(_LOOK_S):
                    await self._mirror.changed()
            seen = self._mirror.revision
            if self._mirror.trouble is not None:
                continue
            try:
                await self._set_right()
            except EtcdError as error:
                _logger.debug("claims of names wait: %s", error)
                await backoff.pause()
            else:
                backoff.reset()
                await trio.sleep(_PAUSE_S)

    async def _set_right(self) -> None:
        """:raises EtcdError:"""
        there = {text_of(vm): vm for vm in self._there()}
        claims = {name: claim for name in self._mirror.section(self._kind) if (claim := self._claim_of(name))}
        owners = {name: claim.owner for name, claim in claims.items()}
        # What another host has from this one is about to be removed here.
        self._note_conflicts(
            {name for name in there if name in claims and self._host not in (owners[name], claims[name].before)}
        )
        for name, vm in there.items():
            # The fence claims those again that another host may have taken over, and their moves decide about others.
            if name not in owners and not self._is_unsure(vm):
                async with self._holding([vm]):
                    if vm in self._there():
                        # Who else has it, the mirror will show.
                        with suppress(NameTaken):
                            await self._claims.create(name, self._new_id(), is_there=lambda: True)
        for name, owner in owners.items():
            if owner == self._host and name not in there:
                vm = key_of(name)
                async with self._holding([vm]):
                    await self._free_unless_there(vm)

    def _note_conflicts(self, found: set[str]) -> None:
        for name in found - set(self.conflicts):
            _logger.error("%s: another host has the name %s, too: only this host finds its own", self._kind, name)
        self.conflicts = tuple(sorted(found))

    async def _claim(self, vm: Key, movable: Movable | None) -> None:
        try:
            made_up: tuple[str, Failover, bytes] = (self._new_id(), "never", b"")
            if movable is not None:
                made_up = movable.id, movable.request.failover, msgspec.json.encode(movable)
            await self._claims.create(text_of(vm), *made_up, is_there=lambda: vm in self._there())
        except NameTaken:
            raise _TAKEN[self._kind](vm.name) from None
        except EtcdError as error:
            raise unavailable(error) from error

    async def _free_unless_there(self, vm: Key) -> None:
        """Frees a name, if this host has it and no VM of that name. What fails now is done by `keep`."""
        if vm in self._there():
            return
        try:
            await self._claims.free(text_of(vm))
        except EtcdError as error:
            _logger.debug("the name %s stays claimed for now: %s", text_of(vm), error)

    def _claim_of(self, name: str) -> Claim | None:
        return claim_of(self._mirror.section(self._kind).get(name))


def text_of(vm: Key) -> str:
    """Returns a name in the fleet: the project and the own one."""
    return f"{vm.project}/{vm.name}"


def key_of(name: str) -> Key:
    """Returns what `text_of` was made of."""
    project, _, own = name.partition("/")
    return Key(project, own)


def unavailable(error: EtcdError | str) -> Problem:
    """Returns the problem of a change that hosts have to agree on, and can't."""
    return Problem(
        503, "fleet-unavailable", f"the hosts of the fleet can't agree on this now: {error}",
        hint="VMs run on, and can be read and used; try again when etcd answers", retry_after_s=5,
    )  # fmt: skip
