"""The two sides of a failover: an isolated host pauses its VMs, and later another host starts them.

`docs/explanation/fleet.md` explains why no VM runs on both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Protocol

import msgspec
import trio

from volant.concurrency import Backoff
from volant.model import Problem

from ._alive import SignOfLife, pause_at
from ._claims import Claim, Claims, NameTaken, ReplicaRecord, claim_of, replica_of
from ._interface import EtcdError
from ._mirror import Mirror

_RETRY_S, _RETRY_MAX_S = 1.0, 30.0
_LEAST_S = 0.01
"""The clocks of Trio and of the sign differ. Without this minimum, waiting for the last moment could loop forever."""
_DISCARD_S = 30.0
_START_S = 60.0
_TRIES = 3
"""Attempts of a start, before other hosts may try it."""
_ABSENT_TTLS = 2
"""For this number of TTLs a host that was away lets others renew claims that etcd has lost. By 4/3, each of them has
paused its VMs or asked etcd for them."""
_logger = logging.getLogger("volant.fleet")


class Vms(Protocol):
    """The movable VMs of a host, which other hosts may start."""

    obstacle: str | None
    """Why this host can have no movable VMs; None if it can."""

    @property
    def held(self) -> Mapping[str, Claim]:
        """The claims of movable VMs on this host, paused or not, by `project/name`, including those from before the
        daemon died. A VM that is about to be deleted has `failover="never"` from before its claim is withdrawn: its
        claim must not be renewed for others."""

    @property
    def undecided(self) -> Collection[str]:
        """The VMs in `held` that this host may have given to another one. If etcd has lost their claims, this host must
        wait for that host to renew them."""

    def spec(self, name: str) -> bytes:
        """Returns the data that another host needs to start a held VM; empty if it may not be started elsewhere."""

    async def has_room(self, name: str, spec: bytes, snapshot: str = "") -> bool:
        """Returns whether this host can start another host's VM now. Called for each VM that may be taken over, each
        second.

        :param snapshot: this host's snapshot from which it would continue; empty if it would boot
        """

    async def pause_all(self) -> None:
        """Stops the processors of all VMs, including those that are started before `resume_all`. They may be paused
        already."""

    async def resume_all(self) -> bool:
        """Resumes all VMs. They may be running already. Returns whether it was done in time."""

    async def release(self) -> None:
        """Makes all VMs ordinary VMs of this host, which keep running, as it has left the fleet."""

    async def start(self, name: str, claim: Claim, spec: bytes) -> None:
        """Creates a VM of another host from the data that this has stored, or from the snapshot in the claim. If others
        may take it over, it is held when this returns, possibly before it has booted. Removes or uses the remains of an
        earlier attempt. It is cancelled after a minute.

        :raises Problem: it can't be started now; it is retried, after delays of 1 to 30 s
        :raises EtcdError: see Problem
        """

    async def discard(self, name: str, claim: Claim) -> None:
        """Ends the process of a paused VM that another host has taken over, and removes the VM. It is not held any more
        when this returns. It is cancelled after 30 s.

        If it raises any error, the VM is still here. All VMs then stay paused, and it is retried, after delays of 1 to
        30 s.
        """


class Fence:
    """Pauses the VMs of a host in time, and resumes them when etcd confirms that they still belong to it."""

    def __init__(self, claims: Claims, sign: SignOfLife, vms: Vms, *, ttl_s: float, now: Callable[[], float]) -> None:
        self._claims = claims
        self._sign = sign
        self._vms = vms
        self.ttl_s = ttl_s
        self._now = now
        self._lapses = sign.lapses
        self._losses = sign.losses
        self._is_open = False
        self.times_closed = 0
        self._opened, self._closed = trio.Event(), trio.Event()
        self._closed.set()
        self._is_sure = False
        """Whether no other host can have taken over held VMs: the time has not expired since etcd was asked."""
        self._absent_since: float | None = None
        """When etcd was first found to lack the claim of a held VM."""
        self._trouble: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether VMs may run. False until etcd was asked for all of them."""
        # Just after this process was stopped for a while, `keep` has not seen it yet.
        return self._is_open and not self._is_late

    async def opened(self) -> None:
        """Waits until VMs may run. When it returns, that may already have changed."""
        await self._opened.wait()

    async def closed(self) -> None:
        """Waits until VMs may not run and are being paused. When it returns, that may already have changed."""
        await self._closed.wait()

    def _turn(self, is_open: bool) -> None:
        if is_open != self._is_open:
            self._is_open = is_open
            # Waiting tasks are notified of each change, however short.
            if is_open:
                self._opened.set()
                self._closed = trio.Event()
            else:
                self.times_closed += 1
                self._closed.set()
                self._opened = trio.Event()

    @property
    def left_s(self) -> float:
        """Returns the seconds for which they may run without another beat."""
        until = self._sign.until
        return 0.0 if until is None else pause_at(until, self.ttl_s) - self._now()

    @property
    def _is_late(self) -> bool:
        return self.left_s <= 0 or self._sign.lapses != self._lapses

    @property
    def _must_ask(self) -> bool:
        return self._is_late or self._sign.losses != self._losses

    async def keep(self) -> None:
        """Pauses and resumes until cancelled. After that, VMs and `is_open` stay as they are, and the watchdog
        continues: the canceller decides about them, for example when the host leaves the fleet.

        After a restart VMs may be running. They continue if etcd answers for all of them in time; otherwise they are
        paused.
        """
        self._discards = Backoff(_RETRY_S, _RETRY_MAX_S)
        # A beat gives no more time: it says nothing of who owns what.
        with trio.move_on_after(max(self.left_s, 0)):
            while not self._must_ask and not self._is_open:
                self._turn(await self._ask_for_all())
        must_pause = not self._is_open
        while True:
            if must_pause or self._must_ask:
                must_pause = False
                self._turn(False)
                await self._pause()
            if not self._is_open:
                self._turn(await self._ask_for_all())
            else:
                with trio.move_on_after(max(self.left_s, _LEAST_S)):
                    await self._sign.changed()

    async def _pause(self) -> None:
        """Pauses all VMs, and waits for a beat if there was none in time."""
        self._losses = self._sign.losses
        await self._vms.pause_all()
        while self.left_s <= 0:
            self._is_sure = False
            await self._sign.changed()
        if self._sign.lapses != self._lapses:
            self._is_sure = False
            self._lapses = self._sign.lapses

    async def _ask_for_all(self) -> bool:
        """Discards VMs that belong to other hosts and resumes the rest; returns whether it was done in time."""
        held = dict(self._vms.held)
        try:
            # First the claims: a VM that is taken over and deleted in between is found among the lost ones.
            found = await self._claims.all_of(list(held))
            lost = await self._claims.lost() if held else frozenset()
        except EtcdError as error:
            await self._put_off(str(error))
            return False
        gone: dict[str, Claim] = {}
        absent: dict[str, Claim] = {}
        for name, claim in held.items():
            there = found[name]
            if _is_gone(claim, there, claim.vm in lost):
                gone[name] = claim
            elif there is None or not there.is_of(claim):
                absent[name] = claim
        if gone or absent:
            # After a restart they may be running.
            await self._vms.pause_all()
        if not await self._discard(gone) or not await self._reclaim(absent):
            return False
        if self._must_ask:
            return False
        self._trouble = None
        if not await self._vms.resume_all():
            await self._put_off("they were not resumed in time")
            return False
        self._is_sure = True
        return True

    async def _discard(self, gone: Mapping[str, Claim]) -> bool:
        """Discards VMs; returns whether all are removed."""
        is_done = True
        for name, claim in gone.items():
            try:
                with trio.fail_after(_DISCARD_S):
                    await self._vms.discard(name, claim)
            except Exception as error:
                # Whatever it is, the VM must not run, and all are frozen together.
                _logger.error(
                    "%s is another host's now, and can't be removed here, so all VMs that may move stay paused: %s",
                    name, str(error) or type(error).__name__,
                )  # fmt: skip
                is_done = False
            else:
                # A key that stays does no harm: it names one VM, which never comes back without a take-over.
                with suppress(EtcdError):
                    await self._claims.forget_lost(claim.vm)
        if is_done:
            self._discards.reset()
        else:
            await self._discards.pause()
        return is_done

    async def _reclaim(self, absent: Mapping[str, Claim]) -> bool:
        """Renews the claims that etcd has lost; returns whether all of the VMs belong to this host."""
        if not absent:
            self._absent_since = None
            return True
        if self._absent_since is None:
            self._absent_since = self._now()
        left_s = self._absent_since + _ABSENT_TTLS * self.ttl_s - self._now()
        if left_s > 0 and not (self._is_sure and absent.keys().isdisjoint(self._vms.undecided)):
            # Another host may have had it since, and be about to claim it again.
            await self._put_off(f"etcd knows nothing of {len(absent)} VMs, which other hosts may claim again", left_s)
            return False
        try:
            for name, claim in absent.items():
                # One that was deleted meanwhile has no claim, and needs none.
                if self._vms.held.get(name) == claim:
                    spec = b"" if claim.failover == "never" else self._vms.spec(name)
                    await self._claims.reclaim(name, claim, spec)
        except (EtcdError, NameTaken) as error:
            await self._put_off(str(error))
            return False
        return True

    async def _put_off(self, reason: str, pause_s: float = _RETRY_S) -> None:
        if reason != self._trouble:
            self._trouble = reason
            _logger.warning("VMs that may move stay paused: %s", reason)
        await trio.sleep(min(pause_s, _RETRY_S))


def _is_gone(mine: Claim, found: Claim | None, is_lost: bool) -> bool:
    """Returns whether a VM belongs to another host. A missing claim does not show that."""
    if found is None:
        return is_lost
    if found.is_of(mine):
        return False
    # Its own for another VM: it was claimed anew when etcd had lost the first claim.
    is_own = found.owner == mine.owner and found.vm != mine.vm and not found.taking
    return is_lost or not is_own


class _Later(msgspec.Struct):
    """A VM whose start has failed."""

    at: float
    backoff: Backoff
    reason: str
    tries: int = 1


class Successor:
    """Takes over the VMs of unreachable hosts.

    :param mirror: the mirror of the signs of life, the claims, the specs and the replicas
    :param slack_s: how long a sign must have been missing
    """

    def __init__(
        self,
        claims: Claims,
        fence: Fence,
        mine: Vms,
        *,
        host: str,
        mirror: Mirror,
        slack_s: float,
        now: Callable[[], float],
    ) -> None:
        self._claims = claims
        self._fence = fence
        self._mine = mine
        self._host = host
        self._mirror = mirror
        self._slack_s = slack_s
        self._now = now
        self._revision = 0
        self._gone_since: dict[str, float] = {}
        self._seen: set[str] = set()
        """Hosts that had a sign of life."""
        self._later: dict[str, _Later] = {}

    async def keep(self) -> None:
        """Checks the claims each second until cancelled. Decoding all of them at each change of etcd would cost a large
        fleet a processor."""
        while True:
            await trio.sleep(_RETRY_S)
            is_known = self._mirror.trouble is None and self._mirror.revision >= self._revision
            self._revision = self._mirror.revision
            if not is_known or not self._fence.is_open:
                # Without current data, no host counts as dead.
                self._gone_since.clear()
                self._seen.clear()
                continue
            for host in self._mirror.section("alive"):
                self._seen.add(host)
                self._gone_since.pop(host, None)
            for name, entry in list(self._mirror.section("vms").items()):
                claim = claim_of(entry)
                if claim is not None and (claim.failover != "never" or claim.snapshot):
                    await self._look_at(name, claim)

    async def _look_at(self, name: str, claim: Claim) -> None:
        if claim.owner == self._host and not claim.offered:
            if claim.taking:
                # Its answer was lost, or the daemon died meanwhile. The mirror may be old.
                await self._start(name, claim)
            return
        if claim.failover == "never":
            # It was moved to a host, and is nobody else's.
            return
        if claim.offered:
            later = self._later.get(name)
            if later is not None and self._now() < later.at:
                # Others first.
                return
        elif claim.owner in self._mirror.section("alive") or not self._is_gone(claim.owner):
            return
        # Written together with the claim.
        spec = self._mirror.section("specs").get(f"vms/{name}")
        if spec is None or name in self._mine.held or not self._fence.is_open:
            return
        snapshot = ""
        if claim.failover == "restore":
            replica = self._replica_of(name, claim)
            if replica is None or self._host not in replica.copies:
                # Never from its image: what it had would be gone without a word.
                return
            snapshot = replica.copies[self._host]
        if not await self._mine.has_room(name, spec.value, snapshot):
            return
        try:
            mine = await self._claims.take_over(name, claim)
        except EtcdError:
            return
        if mine is not None:
            await self._start(name, mine)

    def _replica_of(self, name: str, claim: Claim) -> ReplicaRecord | None:
        """Returns the newest replica of a VM; None if there is none."""
        record = replica_of(self._mirror.section("replicas").get(f"vms/{name}"))
        return record if record is not None and record.is_of(claim) else None

    def _is_gone(self, host: str) -> bool:
        """Returns whether the sign of a host has been missing for long enough."""
        since = self._gone_since.setdefault(host, self._now())
        # One that nobody has seen end may have been lost with all that etcd had, while the host goes on.
        extra_s = 0 if host in self._seen else self._fence.ttl_s
        return self._now() - since >= self._slack_s + extra_s

    async def _start(self, name: str, claim: Claim) -> None:
        """Starts a VM that this host has taken over, and records that. Failures are retried later."""
        later = self._later.get(name)
        if later is not None and self._now() < later.at:
            return
        try:
            held = self._mine.held.get(name)
            if held is None:
                # Equal in all: a VM that was started, and deleted since, is not being taken over any more.
                if await self._claims.get(name) != claim or not self._fence.is_open:
                    return
                spec = await self._claims.spec(name)
                with trio.fail_after(_START_S):
                    await self._mine.start(name, claim, spec)
            elif not held.is_of(claim):
                # An earlier one, which the fence discards.
                return
            await self._claims.settle(name, claim)
        except NameTaken:
            return
        except (EtcdError, Problem, trio.TooSlowError) as error:
            await self._put_off(name, claim, str(error) or f"it takes longer than {_START_S:g} s")
        else:
            self._later.pop(name, None)

    async def _put_off(self, name: str, claim: Claim, reason: str) -> None:
        """Postpones a start after a failure, and lets other hosts try it after some failures."""
        now, before = self._now(), self._later.get(name)
        self._later = {each: later for each, later in self._later.items() if now < later.at + 2 * _RETRY_MAX_S}
        if before is None or before.reason != reason:
            _logger.warning("%s has come from another host, and does not start yet: %s", name, reason)
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S) if before is None else before.backoff
        tries = 1 if before is None else before.tries + 1
        self._later[name] = _Later(now + backoff.take(), backoff, reason, tries)
        # Nobody else has the memory of one that was moved; others may have the same replica.
        if tries >= _TRIES and name not in self._mine.held and self._others_can(name, claim):
            with suppress(EtcdError, NameTaken):
                await self._claims.offer(name, claim)

    def _others_can(self, name: str, claim: Claim) -> bool:
        replica = self._replica_of(name, claim)
        return not claim.snapshot or (replica is not None and len(replica.copies) > 1)
