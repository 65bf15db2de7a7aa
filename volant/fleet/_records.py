"""Small records of a host's VMs on all hosts. If this host is unreachable, the others can still list its VMs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import trio

from volant.concurrency import Backoff
from volant.model import Key, VmRecord

from ._claims import claim_of
from ._interface import EtcdError, KeyValues, Step, delete, put
from ._mirror import Mirror

RECORDS = "records"
_LOOK_S = 2.0
"""The minimum interval of writes. A VM that changes its state several times within this writes one record."""
_AT_ONCE = 64
"""Records in one transaction: etcd allows 128 steps and 1.5 MiB."""
_RETRY_S, _RETRY_MAX_S = 0.5, 10.0
_logger = logging.getLogger("volant.fleet")


class Records:
    """Writes the records of one host's VMs.

    :param rows: returns them
    """

    def __init__(
        self, etcd: KeyValues, mirror: Mirror, host: str, rows: Callable[[], Iterable[tuple[Key, VmRecord]]]
    ) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._host = host
        self._rows = rows

    def get(self, name: str) -> VmRecord | None:
        """Returns the record of a VM, `PROJECT/NAME`; None if there is none."""
        entry = self._mirror.section(RECORDS).get(name)
        return None if entry is None else _decoded(entry.value)

    async def keep(self) -> None:
        """Keeps the records current until cancelled."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        while True:
            await trio.sleep(_LOOK_S)
            if self._mirror.trouble is not None or not self._mirror.revision:
                continue
            try:
                for steps in _batches(self._changes()):
                    await self._etcd.transact([], steps)
            except EtcdError as error:
                _logger.debug("records of VMs wait: %s", error)
                await backoff.pause()
            else:
                backoff.reset()

    def _is_own(self, name: str) -> bool:
        """Returns whether no other host has taken the VM over."""
        claim = claim_of(self._mirror.section("vms").get(name))
        return claim is None or claim.owner == self._host

    def _changes(self) -> list[Step]:
        """Returns the steps that update the records."""
        wanted: Mapping[str, bytes] = {
            f"{vm.project}/{vm.name}": msgspec.json.encode(record) for vm, record in self._rows()
        }
        there = self._mirror.section(RECORDS)
        steps = [
            put(f"{RECORDS}/{name}", value)
            for name, value in wanted.items()
            if (name not in there or there[name].value != value) and self._is_own(name)
        ]
        for name, entry in there.items():
            # Records of a newer version may be unreadable here, and are left to their host.
            if name not in wanted and _host_of(entry.value) in (None, self._host):
                steps.append(delete(f"{RECORDS}/{name}"))
        return steps


class _Written(msgspec.Struct):
    """The members that all versions write."""

    host: str


def _host_of(value: bytes) -> str | None:
    """Returns the host that has written a record; None if it is malformed."""
    try:
        return msgspec.json.decode(value, type=_Written).host
    except (msgspec.MsgspecError, ValueError):
        return None


def _decoded(value: bytes) -> VmRecord | None:
    try:
        return msgspec.json.decode(value, type=VmRecord)
    except (msgspec.MsgspecError, ValueError):
        return None


def _batches(steps: Sequence[Step]) -> Iterable[Sequence[Step]]:
    return [steps[begin : begin + _AT_ONCE] for begin in range(0, len(steps), _AT_ONCE)]
