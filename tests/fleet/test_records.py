"""Records and names of a host's VMs in etcd, beside those of hosts with another version."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec
import pytest
import trio

from tests.simulated.etcd import SimulatedEtcd
from volant.fleet import Claim, Compare, Entry, Mirror, Names, Step, Transaction, put
from volant.fleet._interface import Wrapper
from volant.fleet._records import Records
from volant.model import Key, Problem

WEB = Key("default", "web")


async def test_records_that_a_newer_version_has_written_stay(autojump_clock: Any) -> None:
    etcd = SimulatedEtcd(Random(1))
    mirror = Mirror(etcd, trio.current_time)
    records = Records(etcd, mirror, "h1", lambda: [])
    newer = msgspec.json.encode({"host": "h2", "status": "hibernated"})
    mine = msgspec.json.encode({"host": "h1", "status": "hibernated"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(etcd.run)
        await etcd.transact([], [put("records/default/a", newer), put("records/default/b", mine)])
        await etcd.transact([], [put("records/default/c", b"\xff")])
        nursery.start_soon(mirror.keep)
        nursery.start_soon(records.keep)
        await trio.sleep(10)
        assert set(mirror.section("records")) == {"default/a"}
        assert records.get("default/a") is None
        nursery.cancel_scope.cancel()


async def test_names_are_looked_at_once_a_second_however_much_changes(autojump_clock: Any) -> None:
    etcd = SimulatedEtcd(Random(1))
    mirror = Mirror(etcd, trio.current_time)
    looks: list[float] = []

    def there() -> Sequence[Key]:
        looks.append(trio.current_time())
        return []

    names = Names(etcd, mirror, "h1", "vms", there=there, new_id=lambda: "1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(etcd.run)
        nursery.start_soon(mirror.keep)
        await trio.sleep(2)
        nursery.start_soon(names.keep)
        for number in range(100):
            await etcd.transact([], [put(f"vms/default/vm{number}", msgspec.json.encode(Claim("1", "h2", 1)))])
            await trio.sleep(0.05)
        assert len(looks) <= 7
        # What this host has left behind, in the middle of these, is seen soon.
        await etcd.transact([], [put("vms/default/own", msgspec.json.encode(Claim("1", "h1", 1)))])
        await trio.sleep(2)
        assert "default/own" not in mirror.section("vms")
        nursery.cancel_scope.cancel()


async def test_a_request_waits_for_a_vm_that_is_between_two_hosts(autojump_clock: Any) -> None:
    etcd = SimulatedEtcd(Random(1))
    mirror = Mirror(etcd, trio.current_time)
    names = Names(etcd, mirror, "h1", "vms", there=list, new_id=lambda: "1")
    moved = Claim("1", "h2", 2, before="h1", taking=True, snapshot="moved-1")

    async def continues(after_s: float) -> None:
        await trio.sleep(after_s)
        settled = msgspec.structs.replace(moved, taking=False, snapshot="")
        await etcd.transact([], [put("vms/default/web", msgspec.json.encode(settled))])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(etcd.run)
        nursery.start_soon(mirror.keep)
        await etcd.transact([], [put("vms/default/web", msgspec.json.encode(moved))])
        await trio.sleep(1)
        nursery.start_soon(continues, 4.0)
        began = trio.current_time()
        assert await names.find(Key("default", "web")) == "h2"
        assert 4.0 <= trio.current_time() - began < 5.0

        await etcd.transact([], [put("vms/default/web", msgspec.json.encode(moved))])
        await trio.sleep(1)
        began = trio.current_time()
        with pytest.raises(Problem, match="about to continue it") as refused:
            await names.find(Key("default", "web"))
        assert (refused.value.status, refused.value.code) == (503, "vm-moving")
        assert trio.current_time() - began < 12
        nursery.cancel_scope.cancel()


class Meanwhile(Wrapper):
    """A way to etcd on which a VM comes to this host before the first change."""

    def __init__(self, etcd: SimulatedEtcd, claim: bytes) -> None:
        super().__init__(etcd)
        self._claim = claim
        self.vms: list[Key] = []

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        if not self.vms:
            self.vms.append(WEB)
            await super().transact([], [put("vms/default/web", self._claim)])
        return await super().transact(conditions, steps, otherwise)


async def test_a_new_vm_does_not_take_the_name_of_one_that_has_come_meanwhile(autojump_clock: Any) -> None:
    """The journal would refuse it, but the claim would be that of a VM that was never made."""
    etcd = SimulatedEtcd(Random(1))
    mine = msgspec.json.encode(Claim("1", "h1", 2))
    way = Meanwhile(etcd, mine)
    names = Names(way, Mirror(way, trio.current_time), "h1", "vms", there=lambda: way.vms, new_id=lambda: "2")
    with pytest.raises(Problem, match="there is a VM named 'web' already"):
        async with names.claimed([WEB]):
            pass
    assert etcd.entries["vms/default/web"].value == mine
    # What is left of one that is gone is claimed anew.
    way.vms = [Key("default", "other")]
    async with names.claimed([WEB]):
        assert etcd.entries["vms/default/web"].value != mine


async def test_without_etcd_no_name_is_given_and_no_vm_is_said_not_to_exist(autojump_clock: Any) -> None:
    etcd = SimulatedEtcd(Random(1))
    mirror = Mirror(etcd, trio.current_time)
    vms = [Key("default", "own")]
    names = Names(etcd, mirror, "h1", "vms", there=lambda: vms, new_id=lambda: "1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(etcd.run)
        nursery.start_soon(mirror.keep)
        await etcd.transact([], [put("vms/default/web", msgspec.json.encode(Claim("1", "h2", 1)))])
        while "default/web" not in mirror.section("vms"):
            await mirror.changed()
        new = Key("default", "new")
        assert await names.find(new) is None
        before = etcd.entries

        etcd.lose_quorum()
        with pytest.raises(Problem) as unknown:
            await names.find(new)
        assert (unknown.value.status, unknown.value.code) == (503, "fleet-unavailable")
        with pytest.raises(Problem) as refused:
            async with names.claimed([new]):
                pytest.fail("a VM was made under a name that nobody has given")
        assert (refused.value.status, refused.value.code) == (503, "fleet-unavailable")
        # What is known is still found.
        assert await names.find(vms[0]) == "h1"
        assert await names.find(WEB) == "h2"

        etcd.regain_quorum()
        assert etcd.entries == before
        assert await names.find(new) is None
        async with names.claimed([new]):
            vms.append(new)
        assert "vms/default/new" in etcd.entries
        nursery.cancel_scope.cancel()


class Silent(Wrapper):
    """A way to etcd on which no answer comes back to a read."""

    async def get(self, key: str) -> Entry | None:
        await trio.sleep_forever()


async def test_an_etcd_that_never_answers_is_asked_for_a_name_for_some_seconds(autojump_clock: Any) -> None:
    etcd = Silent(SimulatedEtcd(Random(1)))
    names = Names(etcd, Mirror(etcd, trio.current_time), "h1", "vms", there=list, new_id=lambda: "1")
    with trio.fail_after(10), pytest.raises(Problem, match="not answered within 3 s") as unknown:
        await names.find(WEB)
    assert (unknown.value.status, unknown.value.code) == (503, "fleet-unavailable")
