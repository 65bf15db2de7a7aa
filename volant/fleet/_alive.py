"""A host's sign of life: a key on a lease, which is independent of ownership."""

from __future__ import annotations

from collections.abc import Callable

import trio

from volant.concurrency import Backoff

from ._interface import EtcdError, EtcdUnavailable, KeyValues, Lease, LeaseGone, absent, put, unchanged

_BEATS_IN_A_TTL = 5
_FIRST_PAUSE_S = 0.2


PAUSE_AFTER = 2 / 3
"""The part of the TTL, after the last acknowledged beat, after which VMs are paused."""


def pause_at(until: float, ttl_s: float) -> float:
    """Returns when the VMs of a host are paused, given the end of its sign of life."""
    return until - (1 - PAUSE_AFTER) * ttl_s


class SignOfLife:
    """Keeps the sign of life of a host, and knows its expiry.

    :param key: is deleted after `ttl_s` without a beat of the host
    :param now: a clock in seconds that continues while the host sleeps and can't be set (`CLOCK_BOOTTIME`)
    :param lasts: called with each new `until`, before it is visible elsewhere
    """

    def __init__(
        self,
        etcd: KeyValues,
        key: str,
        value: bytes,
        *,
        ttl_s: int,
        now: Callable[[], float],
        lasts: Callable[[float], None] = lambda until: None,
    ) -> None:
        self._etcd = etcd
        self._key = key
        self._value = value
        self._ttl_s = ttl_s
        self._now = now
        self._lasts = lasts
        self._lease: Lease | None = None
        self._beaten = trio.Event()
        self.until: float | None = None
        """The earliest expiry of the sign, by `now`. It counts from before the beat that etcd has acknowledged, so
        etcd's own countdown ends later. None before the first beat."""
        self.lapses = 0
        """How often the time for VMs expired before the next beat was acknowledged. While this process was stopped,
        only the watchdog can tell."""
        self.losses = 0
        """How often etcd lost this sign before its expiry, because it lost its data. By then another host may have
        restored its own data."""
        self.trouble: str | None = None
        """Why the last beat failed; None if it succeeded."""

    def go_on(self, until: float | None) -> None:
        """Continues with the last value of `lasts` from another daemon of this host, before the first beat.

        :param until: None if unknown. A value later than any possible expiry is ignored.
        """
        # Not after a boot, with a clock that begins anew. No comparison with NaN holds.
        self.until = until if until is not None and until <= self._now() + self._ttl_s else None

    def doubt(self) -> None:
        """Renews the sign and verifies the state that depends on it, as etcd may have lost data."""
        self._lease = None
        self.losses += 1
        self._notify()

    def lapse(self) -> None:
        """Counts an expiry of the time for VMs that was detected elsewhere."""
        self.lapses += 1
        self._notify()

    def _notify(self) -> None:
        self._beaten.set()
        self._beaten = trio.Event()

    async def changed(self) -> None:
        """Waits for the next acknowledged beat, or the next expiry detected elsewhere."""
        await self._beaten.wait()

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Beats until cancelled. Starts at once, also without etcd."""
        pause_s = self._ttl_s / _BEATS_IN_A_TTL
        backoff = Backoff(_FIRST_PAUSE_S, pause_s)
        task_status.started()
        while True:
            try:
                with trio.fail_after(pause_s):
                    await self._beat()
            except LeaseGone:
                self._lease = None
            except (EtcdError, trio.TooSlowError) as error:
                self.trouble = str(error) or f"etcd has not answered within {pause_s:g} s"
                await backoff.pause()
            else:
                self.trouble = None
                backoff.reset()
                await trio.sleep(pause_s)

    async def _beat(self) -> None:
        began = self._now()
        lease = self._lease
        if lease is None:
            before = await self._etcd.get(self._key)
            if before is None and self.until is not None and began < self.until:
                self.losses += 1
            if before is not None and before.value != self._value:
                raise EtcdUnavailable("another host of this name gives a sign of life")
            lease = await self._etcd.grant(self._ttl_s)
            # Without the condition, an earlier attempt of unknown outcome could still arrive, and bind the key to a
            # lease that nobody extends.
            condition = absent(self._key) if before is None else unchanged(before)
            made = await self._etcd.transact([condition], [put(self._key, self._value, lease=lease.id)])
            if not made.done:
                raise EtcdUnavailable("an earlier sign of life has come between")
            self._lease = lease
            ttl_s = lease.ttl_s
        else:
            ttl_s = await self._etcd.keep_alive(lease.id)
        if self.until is not None and self._now() >= pause_at(self.until, self._ttl_s):
            self.lapses += 1
        self.until = began + ttl_s
        self._lasts(self.until)
        self._notify()
