"""The names of a host's VMs, snapshots and volumes. Each name belongs to one host of the fleet.

A name is claimed before the VM is created, and freed after it is deleted. A daemon that dies in between leaves a claim
without a VM, and a restored database may contain VMs without claims: `Names.keep` repairs both.
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
"""The minimum interval of checks, as each decodes all claims of the fleet."""
_RETRY_S, _RETRY_MAX_S = 0.5, 10.0
_FREE_S = 5.0
_FIND_S = 3.0
_CONTINUES_S = 10.0
"""How long a request waits for a VM between two hosts, which usually takes a fraction of a second."""
_LOOK_AGAIN_S, _LOOK_AGAIN_MAX_S = 0.05, 0.5
_ANOTHER = "choose another name, or delete that one first; it may be on another host"
_TAKEN: Mapping[str, Callable[[str], Problem]] = {
    "vms": name_taken,
    "snapshots": lambda name: already_exists("snapshot", name, _ANOTHER),
    "volumes": lambda name: already_exists("volume", name, _ANOTHER),
}
KINDS = tuple(_TAKEN)
"""The kinds of names that are unique in the fleet, as in paths."""
_logger = logging.getLogger("volant.fleet")


class Names:
    """Claims and frees names of one kind for one host.

    :param there: returns the objects of this kind on this host
    :param new_id: returns an id that was never used
    :param is_unsure: returns whether another host may have it, although etcd does not show that
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
        """The objects of this host whose names other hosts have, as `project/name`."""

    def owner(self, vm: Key) -> str | None:
        """Returns the host that has a name, as far as is known; None for no host."""
        return self._host if vm in self._there() else self.owner_of(text_of(vm))

    def owner_of(self, name: str) -> str | None:
        """Returns the host that has claimed `PROJECT/NAME`."""
        claim = self._claim_of(name)
        return None if claim is None else claim.owner

    def claim(self, vm: Key) -> Claim | None:
        """Returns the claim of a name, as far as is known; None if there is none."""
        return self._claim_of(text_of(vm))

    async def find(self, vm: Key) -> str | None:
        """Returns the host that has a name; None for no host. A name that is unknown here may be new, so etcd is asked.
        If another host is about to start or continue the VM, waits for some time.

        :raises Problem: 503, etcd does not answer, so the name may exist; or the VM is being started by a host that has
            just taken it over, and that takes longer.
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
        """Returns the claim of a name that this host does not have. :raises Problem: 503, etcd does not answer"""
        claim = self._claim_of(name)
        if claim is not None and claim.owner != self._host:
            return claim
        # The mirror may be outdated.
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
        """Claims names for the VMs that the block creates, and frees the names of VMs that don't exist at its end.

        :param movable: the data for a start by another host
        :raises Problem: 409, a name is taken; 503, etcd does not answer.
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
        """Frees the name of a deleted VM. If etcd does not answer in time, `keep` does it later."""
        with trio.move_on_after(_FREE_S):
            async with self._holding([vm]):
                await self._free_unless_there(vm)

    @asynccontextmanager
    async def _holding(self, vms: Sequence[Key]) -> AsyncIterator[None]:
        """Prevents other tasks on this host from claiming or freeing these names."""
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
        """Claims missing names and frees unused ones. :raises EtcdError:"""
        there = {text_of(vm): vm for vm in self._there()}
        claims = {name: claim for name in self._mirror.section(self._kind) if (claim := self._claim_of(name))}
        owners = {name: claim.owner for name, claim in claims.items()}
        # A VM that another host has taken over from this one is about to be removed here.
        self._note_conflicts(
            {name for name in there if name in claims and self._host not in (owners[name], claims[name].before)}
        )
        for name, vm in there.items():
            # The fence claims those again that another host may have taken over, and their moves decide about others.
            if name not in owners and not self._is_unsure(vm):
                async with self._holding([vm]):
                    if vm in self._there():
                        # If another host has it, the mirror will show that.
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
        """Frees a name, if this host has it and no VM of that name. `keep` repeats failures."""
        if vm in self._there():
            return
        try:
            await self._claims.free(text_of(vm))
        except EtcdError as error:
            _logger.debug("the name %s stays claimed for now: %s", text_of(vm), error)

    def _claim_of(self, name: str) -> Claim | None:
        return claim_of(self._mirror.section(self._kind).get(name))


def text_of(vm: Key) -> str:
    """Returns a name in the fleet: the project and the VM's name."""
    return f"{vm.project}/{vm.name}"


def key_of(name: str) -> Key:
    """Returns the key from which `text_of` made the text."""
    project, _, own = name.partition("/")
    return Key(project, own)


def unavailable(error: EtcdError | str) -> Problem:
    """Returns the 503 for a change on which the hosts can't agree."""
    return Problem(
        503, "fleet-unavailable", f"the hosts of the fleet can't agree on this now: {error}",
        hint="VMs run on, and can be read and used; try again when etcd answers", retry_after_s=5,
    )  # fmt: skip
