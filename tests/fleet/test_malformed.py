"""What another version or a faulty program has written into etcd."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import pytest
import trio

from tests.simulated.etcd import SimulatedEtcd
from volant.fleet import HostRecord, Mirror, delete, known_hosts, put
from volant.fleet._definitions import _number
from volant.fleet._interface import Entry
from volant.fleet._membership import Membership
from volant.model import HostFacts, HostLoad

FACTS = HostFacts(address="h1:1", version="", architecture="", cpu_cores=1, memory_mb=1)


@pytest.mark.parametrize("number", ["-1", "0", "1000", "9" * 30, "9" * 5000])
async def test_a_host_with_a_number_that_no_host_has_is_not_known(number: str, autojump_clock: Any) -> None:
    good = msgspec.json.encode(HostRecord("01234567", 7, FACTS))
    bad = good.replace(b'"number":7', b'"number":%b' % number.encode())
    etcd = SimulatedEtcd(Random(1))
    await etcd.transact([], [put("hosts/h1", bad), put("hosts/h2", good), put("hosts/h3", b"\xff" * 10**6)])
    assert set(await known_hosts(etcd)) == {"h2"}


@pytest.mark.parametrize("value", [b"", b"x", b"-1", b"9" * 5000, b"\xff"])
def test_a_malformed_revision_counts_as_none(value: bytes) -> None:
    assert _number(Entry("seen/h1", value, 1, 1)) == 0


async def test_a_record_that_can_not_be_read_is_not_overwritten(autojump_clock: Any) -> None:
    etcd = SimulatedEtcd(Random(1))
    await etcd.transact([], [put("hosts/h1", b'{"of":"another version"}')])

    async def take_number(number: int) -> None:
        await trio.lowlevel.checkpoint()

    mirror = Mirror(etcd, trio.current_time)
    membership = Membership(
        etcd, mirror, "h1", "01234567", facts=lambda: FACTS, load=HostLoad, take_number=take_number
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mirror.keep)
        nursery.start_soon(membership.keep)
        await trio.sleep(30)
        assert etcd.entries["hosts/h1"].value == b'{"of":"another version"}'
        assert not membership.joined.is_set()
        assert "hosts/h1" in str(membership.trouble)
        assert "volar hosts delete h1" in str(membership.trouble)
        # As that does.
        await etcd.transact([], [delete("hosts/h1")])
        await trio.sleep(30)
        assert membership.joined.is_set()
        assert membership.trouble is None
        nursery.cancel_scope.cancel()
