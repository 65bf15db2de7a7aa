"""A warm process belongs to the pool until a row names it, and none is left without an owner."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, strategies as st

from tests.templates.test_store import KEY, add, spec_of
from volant.host import Host, Process
from volant.hypervisor import HypervisorError, LaunchFailed, MachineSpec, Nic, ParkedControl
from volant.hypervisor.qemu import QemuHypervisor
from volant.model import ProcessIdentity
from volant.templates import (
    Claim,
    GuestConfig,
    TemplateFailed,
    TemplateSpec,
    TemplateStore,
    WarmPool,
    WarmPoolLimits,
    WarmProcess,
)
from volant.templates._demand import Use, most_together, pause_s, wanted
from volant.templates._warm_pool import WarmCounts, claim_in
from volant.vm import bounds_of


def template_spec(memory_mb: int = 128, config: GuestConfig | None = None, *, has_nic: bool = False) -> TemplateSpec:
    return spec_of(msgspec.structs.replace(KEY, memory_mb=memory_mb, config=config, has_nic=has_nic))


class Hypervisor(QemuHypervisor):
    """Launches a process that sleeps instead of a machine."""

    refuses = False
    hangs = False
    launched: list[MachineSpec]
    running: list[MachineSpec]

    async def launch(self, spec: MachineSpec) -> ProcessIdentity:
        self.launched.append(spec)
        if self.refuses:
            raise LaunchFailed("template_refused", "it does not fit")
        assert spec.start_paused
        await self._host.files.mkdir(spec.directory)
        argv = ["/bin/sh", "-c", "sleep 1000 & wait", spec.tag]
        return await self._host.processes.spawn(
            argv, tag=spec.tag, env={}, cwd=spec.directory, stdout_path=spec.log_path
        )

    async def resume_warm(self, spec: MachineSpec, control: ParkedControl | None = None) -> None:
        if self.hangs:
            raise HypervisorError("it does not answer")
        assert spec.log_path.exists()
        self.running.append(spec)


@dataclass
class Row:
    """The part of a VM's row that the pool reads."""

    tag: str


@dataclass
class Rows:
    """A projection."""

    drain: object = None
    tags: list[str] = field(default_factory=list)

    def rows(self) -> list[Row]:
        return [Row(tag) for tag in self.tags]


class Pool:
    """A pool under test, and the world around it."""

    def __init__(self, path: Path, limits: WarmPoolLimits) -> None:
        self.host = Host()
        self.path = path
        self.rows: Any = Rows()
        self.hypervisor = Hypervisor(self.host, path / "c", accelerator="tcg")
        self.hypervisor.launched, self.hypervisor.running = [], []
        self.quiet = True
        self.warmed: list[str] = []
        self.cold: Exception | None = None
        self.store = TemplateStore(self.host, path / "templates")
        self.instance = self.host.random.new_id()[:10]
        self.runtime_dir = path / "r"
        self.warm_pool = self.new(limits)

    def new(self, limits: WarmPoolLimits) -> WarmPool:
        return WarmPool(
            self.host,
            self.hypervisor,
            self.store,
            self.rows,
            limits,
            instance=self.instance,
            runtime_dir=self.runtime_dir,
            memory_dir=self.path / "mem",
            quiet=lambda: self.quiet,
            bounds=bounds_of,
            warm_up=self.warm_up,
        )

    async def warm_up(self, host: Host, hypervisor: object, spec: MachineSpec, identity: ProcessIdentity) -> None:
        """A process that sleeps is warm at once."""
        self.warmed.append(spec.tag)
        if self.cold is not None:
            raise self.cold

    async def until(self, holds: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not holds():  # noqa: ASYNC110
                await trio.sleep(0.01)

    async def looked(self) -> None:
        """Returns once the pool has checked, long enough after the last claim, whether a process may start."""
        asked, ask = trio.Event(), self.warm_pool.quiet

        def quiet() -> bool:
            asked.set()
            return ask()

        self.warm_pool.quiet = quiet
        try:
            with trio.fail_after(20):
                await asked.wait()
        finally:
            self.warm_pool.quiet = ask

    async def filled(self, count: int = 1) -> None:
        await self.until(lambda: len(self.warm_pool.tags) == count)

    async def take(self, vm_id: int, of: TemplateSpec) -> WarmProcess:
        standby = self.warm_pool.take(vm_id, of)
        assert standby is not None
        return standby

    async def processes(self) -> set[str]:
        return {each.tag for each in await self.host.processes.scan(f"volant-{self.instance}-")}

    def spec(self, standby: WarmProcess, vm_id: int) -> MachineSpec:
        directory = self.runtime_dir / "vms" / str(vm_id)
        spec = self.warm_pool._machine(template_spec(), standby.tag)
        return msgspec.structs.replace(spec, vm_id=vm_id, name="vm", directory=directory, start_paused=False)


@asynccontextmanager
async def standing(path: Path, limits: WarmPoolLimits | None = None) -> AsyncIterator[Pool]:
    """A pool that has a template."""
    pool = Pool(path, limits or WarmPoolLimits(each=1))
    await add(pool.store, KEY)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.warm_pool.keep)
            yield pool
            nursery.cancel_scope.cancel()
        left = await pool.processes()
        assert left == set(pool.rows.tags), "a pool that stops leaves what rows name and nothing else"
    finally:
        for identity in await pool.host.processes.scan(f"volant-{pool.instance}-"):
            with pool.host.processes.open(identity) as process:
                process.kill()
                await process.wait()


def used(memory_mb: int, *times: float) -> Use:
    use = Use(template_spec(memory_mb))
    for time in times:
        use.note(time)
    return use


def test_the_most_recently_used_templates_get_processes_within_the_memory_limit() -> None:
    uses = {"a": used(128, 10.0), "b": used(512, 20.0), "c": used(128, 5.0)}
    assert wanted(uses, 21.0, WarmPoolLimits(each=2, max_mb=1200), 0) == {"b": 2, "a": 1}
    assert wanted(uses, 21.0, WarmPoolLimits(each=1, max_mb=1200), 0) == {"b": 1, "a": 1, "c": 1}
    assert wanted(uses, 21.0, WarmPoolLimits(each=2, max_mb=300), 0) == {"a": 2}
    assert wanted(uses, 21.0, WarmPoolLimits(each=0), 4096) == {}
    assert wanted(uses, 106.0, WarmPoolLimits(each=1, idle_s=100.0), 0) == {"b": 1, "a": 1}


def test_demand_decides_how_many_processes_wait() -> None:
    limits = WarmPoolLimits(most=4)
    for times, count in (
        ((0.0,), 1),
        ((0.0, 30.0, 60.0), 1),
        ((0.0, 1.0, 60.0), 2),
        ((*(number / 10 for number in range(20)),), 4),
    ):
        assert wanted({"a": used(128, *times)}, 61.0, limits, 4096) == {"a": count}, times
    assert wanted({"a": used(128, 0.0, 1.0, 700.0)}, 701.0, limits, 4096) == {"a": 1}, "the burst is forgotten"


def test_processes_that_follow_demand_take_a_quarter_of_the_free_memory() -> None:
    uses = {"a": used(128, 0.0, 1.0, 2.0), "b": used(256, 3.0)}
    assert wanted(uses, 4.0, WarmPoolLimits(), 4096) == {"b": 1, "a": 3}
    assert wanted(uses, 4.0, WarmPoolLimits(), 2048) == {"b": 1, "a": 2}
    assert wanted(uses, 4.0, WarmPoolLimits(), 1000) == {"a": 1}


@given(st.lists(st.floats(0, 100)))
def test_clones_begin_together_within_ten_seconds(times: list[float]) -> None:
    times.sort()
    most = max((sum(0 <= other - time < 10 for other in times) for time in times), default=1)
    assert most_together(times) == most


def test_the_pool_waits_for_the_end_of_a_series_of_clones() -> None:
    assert pause_s(-inf, 100.0) == pause_s(90.0, 100.0) == 0.5
    assert pause_s(99.0, 100.0) > 1.0
    assert pause_s(99.9, 100.0) > 0.5, "the VM claimed a process, and the next one will take longer"


def test_idle_time_has_no_rounding_gap() -> None:
    limits, rounded = WarmPoolLimits(each=1, idle_s=40.0), 0
    for number in range(1000):
        use = used(128, 100 / 3 * number)
        now = use.idle_at(limits)
        rounded += now - use.at < limits.idle_s
        assert wanted({"a": use}, now, limits, 0) == {}
    assert rounded, "none of these is one of those that once were idle to the clock and not to the pool"


async def test_a_template_that_was_just_built_has_a_process_for_its_first_clone(tmp_path: Path) -> None:
    async with standing(tmp_path, WarmPoolLimits()) as pool:
        pool.warm_pool.expect(template_spec())
        await pool.filled()
        pool.rows.tags.append((await pool.take(1, template_spec())).tag)
        assert pool.warm_pool.take(2, template_spec()) is None
        assert pool.warm_pool.counts == {template_spec().digest: WarmCounts(hits=1, misses=1)}
        figures = pool.warm_pool.statistics()
        assert (figures["started"], figures["missed"], figures["waiting"]) == (1, 1, {})
        await pool.filled(3)
        assert pool.warm_pool.waiting(template_spec().digest) == 3


async def test_memory_pressure_empties_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with standing(tmp_path) as pool:
        pool.warm_pool.expect(template_spec())
        await pool.filled()
        monkeypatch.setattr(pool.host.machine, "is_short_of_memory", lambda: True)
        pool.warm_pool._wake.set()
        await pool.filled(0)
        monkeypatch.setattr(pool.host.machine, "is_short_of_memory", lambda: False)
        assert pool.warm_pool.take(1, template_spec()) is None
        await pool.until(lambda: pool.warm_pool._wake.statistics().tasks_waiting == 1)
        assert pool.warm_pool.lacks()
        assert not pool.warm_pool.tags, "it stays empty for a while"


async def test_a_used_template_gets_a_process_that_a_vm_claims(tmp_path: Path) -> None:
    async with standing(tmp_path) as pool:
        assert pool.warm_pool.take(7, template_spec()) is None
        await pool.filled()
        standby = await pool.take(7, template_spec())
        # The row names it, and from then on it is the row's.
        pool.rows.tags.append(standby.tag)
        assert pool.warm_pool.settle(7, standby.tag) == standby
        spec = pool.spec(standby, 7)
        for _ in range(2):
            assert await pool.warm_pool.claim(spec, Claim(3, "vm", ""))
        assert pool.hypervisor.running == [spec, spec]
        assert pool.host.proc.working_directory(standby.identity) == spec.directory
        assert await claim_in(pool.host, spec.directory) == Claim(3, "vm", "")
        await pool.filled()
        assert pool.warm_pool.tags != {standby.tag}


@pytest.mark.parametrize("behind", [{"tap": "v7"}, {"socket": Path("/run/volant/net/7.sock")}])
async def test_a_process_with_a_nic_gets_the_vms_at_the_claim(tmp_path: Path, behind: dict[str, Any]) -> None:
    async with standing(tmp_path, WarmPoolLimits(each=1)) as pool:
        with_nic = template_spec(has_nic=True)
        pool.warm_pool.take(7, with_nic)
        await pool.filled()
        assert pool.warm_pool.take(8, template_spec()) is None
        standby = await pool.take(7, with_nic)
        pool.rows.tags.append(standby.tag)
        pool.warm_pool.settle(7, standby.tag)
        (launched,) = [each for each in pool.hypervisor.launched if each.tag == standby.tag]
        assert launched.nic is not None
        assert (launched.nic.tap, launched.nic.socket, launched.nic.address) == (None, None, "")
        nic = Nic(mac="02:00:00:00:00:07", address="192.168.127.7/24", gateway="192.168.127.1", **behind)
        spec = msgspec.structs.replace(pool.spec(standby, 7), nic=nic)
        assert await pool.warm_pool.claim(spec, Claim(1, "vm", "", nic))
        assert pool.hypervisor.running == [spec]
        assert await claim_in(pool.host, spec.directory) == Claim(1, "vm", "", nic), "no command line says it"


async def test_a_process_of_a_template_with_a_disk_has_a_copy_that_goes_with_it(tmp_path: Path) -> None:
    with_disk = msgspec.structs.replace(KEY, rootfs="r", disk_mb=64)
    of_it = msgspec.structs.replace(spec_of(with_disk), rootfs=Path("/r"))
    async with standing(tmp_path, WarmPoolLimits(each=2)) as pool:
        directory = await add(pool.store, with_disk)
        pool.warm_pool.take(7, of_it)
        await pool.filled(2)
        standby = await pool.take(7, of_it)
        pool.rows.tags.append(standby.tag)
        assert pool.warm_pool.settle(7, standby.tag) == standby
        assert standby.layer is not None
        layers = [*standby.layer.parent.iterdir()]
        assert len(layers) >= 2
        assert {each.read_bytes() for each in layers} == {(directory / "root.qcow2").read_bytes()}
        await pool.store.remove(of_it.digest)
        await pool.until(lambda: [*layers[0].parent.iterdir()] == [standby.layer])


async def test_a_guest_rehearses_unless_a_workload_runs_in_it(tmp_path: Path) -> None:
    with_workload = template_spec(config=GuestConfig({"name": "browser"}, {"command": ["/browser"]}))
    async with standing(tmp_path, WarmPoolLimits(each=1)) as pool:
        pool.warm_pool.take(1, template_spec())
        await pool.filled()
        assert pool.warmed == [*pool.warm_pool.tags]
        pool.warm_pool.take(2, with_workload)
        await pool.filled(2)
        assert len(pool.warmed) == 1


@pytest.mark.parametrize("error", [TemplateFailed("agent_timeout", "it sleeps"), HypervisorError("it hangs")])
async def test_a_guest_that_does_not_answer_is_ended_and_the_next_one_delayed(tmp_path: Path, error: Exception) -> None:
    async with standing(tmp_path) as pool:
        pool.cold = error
        pool.warm_pool.take(1, template_spec())
        await pool.until(lambda: pool.warm_pool.figures.failed_starts == 1)
        await pool.until(lambda: not list((pool.runtime_dir / "standby").iterdir()))
        assert not await pool.processes()
        pool.warm_pool.take(1, template_spec())
        await pool.until(lambda: pool.warm_pool._wake.statistics().tasks_waiting == 1)
        assert len(pool.warmed) == 1


async def test_a_process_that_was_taken_and_not_claimed_is_ended(tmp_path: Path) -> None:
    async with standing(tmp_path, WarmPoolLimits(each=2)) as pool:
        pool.warm_pool.take(1, template_spec())
        await pool.filled(2)
        one, two = await pool.take(1, template_spec()), await pool.take(2, template_spec())
        pool.quiet = False
        assert pool.warm_pool.settle(1, "volant-another-1.1") is None
        await pool.warm_pool.clear(2)
        assert two.tag not in await pool.processes()
        await pool.until(lambda: not pool.host.files.exists(pool.runtime_dir / "standby" / one.tag.rpartition(".")[2]))
        assert await pool.processes() == set()


async def test_a_failed_claim_leaves_nothing(tmp_path: Path) -> None:
    async with standing(tmp_path) as pool:
        pool.warm_pool.take(1, template_spec())
        await pool.filled()
        pool.hypervisor.hangs = True
        standby = await pool.take(1, template_spec())
        pool.quiet = False
        assert not await pool.warm_pool.claim(pool.spec(standby, 1), Claim(1, "vm", ""))
        assert await pool.processes() == set()
        assert (pool.warm_pool.figures.claimed, pool.warm_pool.figures.failed_claims) == (0, 1)


async def test_no_process_starts_during_a_boot_or_a_drain_or_without_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with standing(tmp_path) as pool:
        pool.quiet = False
        pool.warm_pool.take(1, template_spec())
        await pool.looked()
        pool.quiet, pool.rows.drain = True, "drains"
        pool.warm_pool.take(1, template_spec())
        await pool.looked()
        assert not await pool.processes()
        pool.rows.drain = None
        pool.warm_pool.take(1, template_spec())
        await pool.filled()
        # What waits gives way to what is there already.
        monkeypatch.setattr(pool.host.machine, "memory_available_mb", lambda: 100)
        pool.warm_pool._wake.set()
        await pool.filled(0)
        await pool.until(lambda: not list((pool.runtime_dir / "standby").iterdir()))


async def test_the_pool_survives_a_host_without_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with standing(tmp_path) as pool:
        refusals = [OSError(errno.EMFILE, "Too many open files")]
        available_mb = pool.host.machine.memory_available_mb

        def look() -> int:
            if refusals:
                raise refusals.pop()
            return available_mb()

        monkeypatch.setattr(pool.host.machine, "memory_available_mb", look)
        pool.warm_pool.take(1, template_spec())
        await pool.filled()
        assert not refusals


async def test_a_process_that_cannot_be_watched_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with standing(tmp_path) as pool:
        refusals = [OSError(errno.EMFILE, "Too many open files")]
        open_process = pool.host.processes.open

        def refuse(identity: ProcessIdentity) -> Process:
            if refusals:
                raise refusals.pop()
            return open_process(identity)

        monkeypatch.setattr(pool.host.processes, "open", refuse)
        pool.warm_pool.take(1, template_spec())
        await pool.until(lambda: pool.warm_pool.figures.died == 1)
        assert not pool.warm_pool.tags


async def test_processes_end_with_their_template_when_idle_and_when_they_die(tmp_path: Path) -> None:
    async with standing(tmp_path, WarmPoolLimits(each=1, idle_s=3.0)) as pool:
        pool.warm_pool.take(1, template_spec())
        await pool.filled()
        await pool.filled(0)
        pool.warm_pool.take(1, template_spec())
        await pool.filled()
        await pool.store.remove(template_spec().digest)
        assert not pool.warm_pool.tags
        pool.warm_pool.take(1, template_spec())
        await pool.filled()
        (tag,) = pool.warm_pool.tags
        found = await pool.host.processes.find(tag)
        assert found is not None
        with pool.host.processes.open(found) as process:
            process.kill()
        await pool.filled(0)
        assert pool.warm_pool.figures.died == 1


async def test_the_next_daemon_ends_unclaimed_processes_only(tmp_path: Path) -> None:
    async with standing(tmp_path, WarmPoolLimits(each=3)) as pool:
        pool.warm_pool.take(1, template_spec())
        await pool.filled(3)
        named, moved, waits = [await pool.take(vm_id, template_spec()) for vm_id in (1, 2, 3)]
        pool.quiet = False
        # One was just given to a VM, and the row of another one was lost.
        pool.rows.tags.append(named.tag)
        assert await pool.warm_pool.claim(pool.spec(moved, 2), Claim(1, "vm", ""))
        stray = tmp_path / "standby" / "0123.qcow2"
        stray.parent.mkdir()
        stray.touch()
        after = pool.new(WarmPoolLimits(each=0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(after.keep)
            await pool.until(lambda: not stray.exists())
            nursery.cancel_scope.cancel()
        assert await pool.processes() == {named.tag, moved.tag}
        assert waits.tag not in await pool.processes()
        pool.rows.tags.append(moved.tag)
