"""Leases are given in the transaction that creates the VM, and returned with its row."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.journal.kit import Bench, events_after, running
from tests.journal.test_backup import keeping, restore
from tests.names import named
from volant.journal import (
    AddNetwork,
    BeginSnapshot,
    CommitSteps,
    FinishSnapshot,
    ForkRow,
    RemoveNetwork,
    RestoreRow,
    SetProjectEgress,
)
from volant.model import (
    DEFAULT_PROJECT,
    CreateNetwork,
    ForkVm,
    NetworkChoice,
    Networking,
    Problem,
    RestoreVm,
    Status,
    Step,
    TakeSnapshot,
    VmRow,
    tap_of,
)
from volant.model._network import mac_of

INSTANCE = "0123456789"
BRIDGE_BY_DEFAULT = NetworkChoice("bridge", "the daemon's setting `network`")
BRIDGED = Networking(default=BRIDGE_BY_DEFAULT, instance=INSTANCE)
TINY = Networking(default=BRIDGE_BY_DEFAULT, subnet=IPv4Network("10.0.0.0/29"), instance=INSTANCE)
"""For five."""


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept.db"


async def running_vm(bench: Bench, name: str, **fields: Any) -> VmRow:
    return await bench.to(await bench.create(name, **fields), Status.STARTING, Status.RUNNING)


async def test_253_creates_at_once_have_253_addresses_and_the_254th_leaks_nothing(path: Path) -> None:
    made: dict[str, VmRow] = {}
    refused: list[Problem] = []

    async def create(bench: Bench, number: int) -> None:
        try:
            row = await bench.create(f"vm-{number}")
            made[row.name] = row
        except Problem as problem:
            refused.append(problem)

    async with running(path, networking=BRIDGED) as bench:
        async with trio.open_nursery() as nursery:
            for number in range(254):
                nursery.start_soon(create, bench, number)
        addresses = {row.ip_address for row in made.values()}
        assert addresses == {f"192.168.127.{last}" for last in range(2, 255)}
        assert len({row.lease.tap for row in made.values() if row.lease}) == 253
        (full,) = refused
        assert (full.status, full.code, full.field) == (503, "subnet-full", "network")
        assert "all 253 addresses of the subnet 192.168.127.0/24" in full.detail
        rows = bench.store.projection.rows()
        assert len(rows) == 253
        # Who was refused has neither row nor event, and their name is free.
        assert len(await events_after(bench.store.events)) == 253
        gone = rows[100]
        await bench.delete(gone)
        assert (await bench.create(gone.name)).ip_address == gone.ip_address
    async with running(path, networking=BRIDGED) as bench:
        assert {row.ip_address for row in bench.store.projection.rows()} == addresses
        with pytest.raises(Problem, match="all 253"):
            await bench.create("one-more")


async def test_a_lease_belongs_to_this_daemon_and_never_changes(path: Path) -> None:
    async with running(path, networking=BRIDGED) as bench:
        await bench.create("other")
        row = await running_vm(bench, "demo")
        assert row.lease is not None
        assert (row.lease.mac, row.lease.tap) == (mac_of(INSTANCE, row.id), tap_of(INSTANCE, row.id))
        assert (row.view.ip_address, row.view.mac_address) == ("192.168.127.3", row.lease.mac)
        frames = await events_after(bench.store.events)
        assert {frame.event.ip_address for frame in frames if frame.event.name == "demo"} == {"192.168.127.3"}
    # Also when those that come have another subnet.
    async with running(path, networking=TINY) as bench:
        assert bench.store.projection.get(named("demo")) == row
        assert (await bench.create("next")).ip_address == "10.0.0.2"


async def test_without_a_network_there_is_no_lease(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.create("demo")
        assert (row.network, row.lease, row.view.ip_address, row.view.mac_address) == ("none", None, "", "")


async def test_each_vm_with_a_user_network_has_the_same_address(path: Path) -> None:
    async with running(path, networking=TINY) as bench:
        rows = [await bench.create(f"vm-{number}", network="user") for number in range(6)]
        assert {row.ip_address for row in rows} == {"10.0.2.15"}
        assert len({row.lease.mac for row in rows if row.lease}) == 6
        assert (await bench.create("bridged")).ip_address == "10.0.0.2"


@pytest.mark.parametrize("network", ["bridge", "user", "blue"])
async def test_a_network_that_the_host_can_not_have_is_refused_with_the_reason(path: Path, network: str) -> None:
    async with running(path, networking=BRIDGED) as bench:
        await bench.ask(AddNetwork(CreateNetwork(name="blue"), DEFAULT_PROJECT))
    obstacles = {"bridge": "it needs root; run volantd as root", "user": "it needs root; run volantd as root"}
    async with running(path, networking=Networking(obstacles=obstacles)) as bench:
        with pytest.raises(Problem) as refused:
            await bench.create("demo", network=network)
        problem = refused.value
        assert (problem.status, problem.code, problem.field) == (503, "network-unavailable", "network")
        assert "run volantd as root" in problem.detail
        assert "asked for" in problem.detail
        await bench.create("demo", network="none")
        with pytest.raises(Problem, match="run volantd as root"):
            await bench.ask(AddNetwork(CreateNetwork(name="green"), DEFAULT_PROJECT))


@pytest.mark.parametrize("network", ["user", None])
async def test_a_network_that_bypasses_access_control_is_refused(path: Path, network: str | None) -> None:
    default = NetworkChoice("user", "the daemon's setting `network`")
    async with running(path, networking=Networking(default=default, user_refused="set an API key")) as bench:
        with pytest.raises(Problem, match="set an API key") as refused:
            await bench.create("demo", **({} if network is None else {"network": network}))
        assert (refused.value.status, refused.value.code, refused.value.field) == (409, "network-refused", "network")
        await bench.create("demo", network="none")


async def test_each_boot_updates_whether_destinations_are_filtered(path: Path) -> None:
    said = "volantd does not run as root"
    async with running(path, networking=Networking(user_unfiltered=said)) as bench:
        row = await bench.create("demo", network="user")
        assert row.view.network_reason == (
            "asked for when it was created; its destinations are not filtered, so a guest reaches this host's own "
            f"addresses: {said}"
        )
        assert "not filtered" not in (await bench.create("other", network="none")).view.network_reason
    async with running(path) as bench:
        row = await bench.to(row, Status.STARTING)
        assert row.view.network_reason == "asked for when it was created"


async def test_concurrent_requests_publish_a_port_once(path: Path) -> None:
    refused: list[Problem] = []

    async def create(bench: Bench, name: str, port: str) -> None:
        try:
            await bench.create(name, ports=(port,))
        except Problem as problem:
            refused.append(problem)

    async with running(path, networking=BRIDGED) as bench:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(create, bench, "one", "8080:80")
            nursery.start_soon(create, bench, "another", "0.0.0.0:8080:81")
        (taken,) = refused
        assert (taken.status, taken.code, taken.field) == (409, "port-taken", "ports")
        (row,) = bench.store.projection.rows()
        assert row.name in taken.detail
        # Nothing of who was refused is taken.
        assert (await bench.create("next", ports=("8080:53/udp",))).ip_address == "192.168.127.3"
        await bench.delete(row)
        again = await bench.create("again", ports=("8080:80",))
        assert again.view.ports == ("127.0.0.1:8080:80/tcp",)


async def test_copies_connect_to_no_more_than_their_project_allows_now(path: Path) -> None:
    async with running(path, networking=BRIDGED) as bench:
        vm = await running_vm(bench, "demo")
        await bench.ask(BeginSnapshot(vm.id, TakeSnapshot(name="warm"), "id-warm"))
        await bench.ask(FinishSnapshot(named("warm"), "id-warm", 12.5, 4096))
        await bench.ask(SetProjectEgress(DEFAULT_PROJECT, "none"))
        for message in (
            ForkRow(vm.id, ForkVm(), "fork-a"),
            RestoreRow(RestoreVm(name="again", from_snapshot="warm"), DEFAULT_PROJECT),
        ):
            with pytest.raises(Problem) as refused:
                await bench.ask(message)
            assert (refused.value.status, refused.value.code) == (409, "egress-not-allowed")
    async with running(path, networking=BRIDGED) as bench:
        assert (await bench.create("new")).egress == "none"


async def test_copies_have_leases_of_their_own_and_no_ports(path: Path) -> None:
    async with running(path, networking=BRIDGED) as bench:
        await bench.ask(AddNetwork(CreateNetwork(name="blue"), DEFAULT_PROJECT))
        vm = await running_vm(bench, "demo", network="blue", ports=("8080:80",))
        forks = await bench.ask(ForkRow(vm.id, ForkVm(count=2), "fork-a"))
        await bench.ask(BeginSnapshot(vm.id, TakeSnapshot(name="warm"), "id-warm"))
        await bench.ask(FinishSnapshot(named("warm"), "id-warm", 12.5, 4096))
        restored = await bench.ask(RestoreRow(RestoreVm(name="again", from_snapshot="warm"), DEFAULT_PROJECT))
        copies = [*forks, restored]
        assert [row.ip_address for row in copies] == ["192.168.127.3", "192.168.127.4", "192.168.127.5"]
        assert {(row.network, row.ports) for row in copies} == {("blue", ())}
        assert all("demo" in row.network_reason for row in copies)
        for row in [vm, *copies]:
            await bench.delete(row)
        await bench.ask(RemoveNetwork(named("blue")))
        with pytest.raises(Problem) as gone:
            await bench.ask(RestoreRow(RestoreVm(name="late", from_snapshot="warm"), DEFAULT_PROJECT))
        assert (gone.value.status, gone.value.code) == (404, "network-not-found")


async def test_a_fork_with_too_few_addresses_makes_no_copy(path: Path) -> None:
    async with running(path, networking=TINY) as bench:
        vm = await running_vm(bench, "demo")
        with pytest.raises(Problem) as full:
            await bench.ask(ForkRow(vm.id, ForkVm(count=5), "fork-a"))
        assert (full.value.status, full.value.code) == (503, "subnet-full")
        assert [row.name for row in bench.store.projection.rows()] == ["demo"]
        assert len(await bench.ask(ForkRow(vm.id, ForkVm(count=4), "fork-a"))) == 4


async def test_a_named_network_is_durable_and_removable_without_members(path: Path) -> None:
    async with running(path, networking=BRIDGED) as bench:
        blue = await bench.ask(AddNetwork(CreateNetwork(name="blue"), DEFAULT_PROJECT))
        with pytest.raises(Problem) as twice:
            await bench.ask(AddNetwork(CreateNetwork(name="blue"), DEFAULT_PROJECT))
        assert (twice.value.status, twice.value.code) == (409, "network-exists")
        with pytest.raises(Problem) as unknown:
            await bench.create("demo", network="green")
        assert (unknown.value.status, unknown.value.code) == (404, "network-not-found")
        row = await bench.create("demo", network="blue")
        assert row.ip_address == "192.168.127.2"
    async with running(path, networking=BRIDGED) as bench:
        assert bench.store.projection.networks == {named("blue"): blue}
        with pytest.raises(Problem) as used:
            await bench.ask(RemoveNetwork(named("blue")))
        assert (used.value.status, used.value.code) == (409, "network-in-use")
        assert "demo" in used.value.detail
        await bench.delete(row)
        await bench.ask(RemoveNetwork(named("blue")))
        with pytest.raises(Problem) as gone:
            await bench.ask(RemoveNetwork(named("blue")))
        assert gone.value.status == 404
    async with running(path, networking=BRIDGED) as bench:
        assert bench.store.projection.networks == {}


async def test_a_network_that_a_vm_is_joining_can_not_be_removed(path: Path) -> None:
    """Whoever comes first in the transaction is right, and so is what the other one is told."""
    outcomes: list[str] = []

    async def run(what: str, action: Any) -> None:
        try:
            await action()
            outcomes.append(what)
        except Problem as problem:
            outcomes.append(problem.code)

    async with running(path, networking=BRIDGED) as bench:
        await bench.ask(AddNetwork(CreateNetwork(name="blue"), DEFAULT_PROJECT))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "removed", lambda: bench.ask(RemoveNetwork(named("blue"))))
            nursery.start_soon(run, "created", lambda: bench.create("demo", network="blue"))
        assert sorted(outcomes) in (["created", "network-in-use"], ["network-not-found", "removed"])
        assert (named("blue") in bench.store.projection.networks) == (len(bench.store.projection) == 1)


async def test_restored_leases_get_the_names_of_this_daemon(path: Path, kept: Path) -> None:
    async with keeping(path, networking=BRIDGED) as bench:
        await bench.ask(AddNetwork(CreateNetwork(name="blue"), DEFAULT_PROJECT))
        row = await bench.create("demo", network="blue", ports=("8080:80",))
        await bench.backup(kept)
    other = Networking(default=BRIDGE_BY_DEFAULT, instance="fedcba9876")
    elsewhere = path.with_name("elsewhere.db")
    restore(elsewhere, kept, instance=other.instance)
    async with keeping(elsewhere, networking=other) as bench:
        again = bench.store.projection.get(named("demo"))
        assert again is not None
        assert again.lease is not None
        assert (again.ip_address, again.network, again.ports) == (row.ip_address, "blue", row.ports)
        assert (again.lease.tap, again.lease.mac) == (tap_of("fedcba9876", row.id), mac_of("fedcba9876", row.id))
        assert set(bench.store.projection.networks) == {named("blue")}
        assert (await bench.create("next")).ip_address == "192.168.127.3"


async def test_no_guest_gets_the_host_address_of_a_former_subnet(path: Path) -> None:
    before = Networking(default=BRIDGE_BY_DEFAULT, subnet=IPv4Network("10.0.0.4/30"), instance=INSTANCE)
    async with running(path, networking=before) as bench:
        assert (await bench.create("old")).ip_address == "10.0.0.6"
    async with running(path, networking=TINY) as bench:
        addresses = [(await bench.create(f"vm-{number}")).ip_address for number in range(3)]
        # Neither 10.0.0.5, which is the host's, nor 10.0.0.6.
        assert addresses == ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
        with pytest.raises(Problem, match="taken"):
            await bench.create("one-more")


async def test_the_lowest_free_address_is_given_next(path: Path) -> None:
    """Also in the middle of one transaction, in which others were given."""
    async with running(path, networking=BRIDGED) as bench:
        rows = [await bench.create(f"vm-{number}") for number in range(4)]
        gone = await bench.to(rows[1], Status.DELETING)
        made: list[VmRow] = []

        async def create(name: str) -> None:
            made.append(await bench.create(name))

        async def remove() -> None:
            await bench.ask(CommitSteps(gone.id, gone.revision, (Step(None, "deleted"),)))

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(create, f"before-{number}")
            nursery.start_soon(remove)
            for number in range(3):
                nursery.start_soon(create, f"after-{number}")
        taken = {row.ip_address for row in bench.store.projection.rows()}
        assert len(taken) == 9
        assert (await bench.create("last")).ip_address not in taken
        assert {row.ip_address for row in bench.store.projection.rows()} == {f"192.168.127.{n}" for n in range(2, 12)}


async def test_a_policy_that_the_host_cannot_enforce_is_refused_and_others_are_not(path: Path) -> None:
    unfiltered = msgspec.structs.replace(BRIDGED, egress_obstacles={"bridge": "dnspython is not installed"})
    async with running(path, networking=unfiltered) as bench:
        with pytest.raises(Problem, match="dnspython is not installed") as refused:
            await bench.create("walled", egress="none")
        assert (refused.value.status, refused.value.code, refused.value.field) == (503, "egress-unavailable", "egress")
        assert (await bench.create("open")).egress == "all"
        assert (await bench.create("without", network="none", egress="none")).egress == "none"
