"""The actor `templates` builds one template at a time, retries failed ones, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from actors import ONE_FOR_ONE, Child, Ref, Supervisor, open_system
from tests.templates.test_store import KEY, add, spec_of
from volant.host import Host
from volant.host._machine import LinuxMachine
from volant.hypervisor.qemu import QemuHypervisor
from volant.journal import Projection
from volant.model import Drain, Problem, TemplateView
from volant.templates import (
    TemplateBuilder,
    TemplateFailed,
    Templates,
    TemplateSpec,
    TemplateStore,
    WarmPool,
    WarmPoolLimits,
    _actor,
)
from volant.templates.messages import Build, GiveWay, ListTemplates, RemoveTemplate, Suspect, Wanted
from volant.vm import BootLimiter, bounds_of

SPEC = spec_of(KEY)


class Builder:
    """Instead of a boot: `outcome` None makes a template."""

    def __init__(self) -> None:
        self.outcome: TemplateFailed | None = None
        self.begun = 0
        self.under_way = False
        self.may_end = trio.Event()

    async def build(self, builder: TemplateBuilder, spec: TemplateSpec) -> None:
        self.begun += 1
        self.under_way = True
        try:
            await self.may_end.wait()
        finally:
            self.under_way = False
        if self.outcome is not None:
            raise self.outcome
        await add(builder._store, spec.key)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    builder = Builder()
    monkeypatch.setattr(TemplateBuilder, "build", lambda real, spec: builder.build(real, spec))
    monkeypatch.setattr(_actor, "_QUIET_S", 0.0)
    return builder


@asynccontextmanager
async def standing(
    tmp_path: Path,
    *,
    enabled: bool = True,
    boot_slots: BootLimiter | None = None,
    projection: Projection | None = None,
) -> AsyncIterator[Ref[Any]]:
    host = Host()
    hypervisor = QemuHypervisor(host, tmp_path / "c", accelerator="tcg")
    store = TemplateStore(host, tmp_path / "t", enabled=enabled)
    projection = Projection() if projection is None else projection
    places: Any = {"instance": "volant-test", "runtime_dir": tmp_path / "r", "memory_dir": tmp_path / "mem"}
    build = TemplateBuilder(host, hypervisor, store, **places)
    pool = WarmPool(
        host,
        hypervisor,
        store,
        projection,
        WarmPoolLimits(each=0),
        quiet=lambda: True,
        bounds=bounds_of,
        **places,
    )
    slots = boot_slots or BootLimiter(1)

    def templates() -> Templates:
        return Templates(host, store, build, pool, slots, projection, max_bytes=2**30, max_age=timedelta(days=1))

    child = Child("templates", templates)
    async with open_system(Supervisor(ONE_FOR_ONE, intensity=1, period_s=60, children=[child])):
        yield child.ref


async def views(ref: Ref[Any]) -> list[TemplateView]:
    return list(await ref.ask(ListTemplates(), timeout_s=5))


async def until(ref: Ref[Any], state: str) -> TemplateView:
    with trio.fail_after(10):
        while not (found := [view for view in await views(ref) if view.state == state]):  # noqa: ASYNC110
            await trio.sleep(0.01)
    return found[0]


async def test_a_template_wanted_often_is_built_once(tmp_path: Path, builder: Builder) -> None:
    async with standing(tmp_path) as ref:
        for _ in range(3):
            ref.tell(Wanted(SPEC))
        await until(ref, "building")
        builder.may_end.set()
        view = await until(ref, "ready")
        assert (view.digest, view.plugin, view.after, view.error) == (KEY.digest, "base", "agent", None)
        again = await ref.ask(Build(SPEC), timeout_s=5)
        assert (again.digest, builder.begun) == (view.digest, 1)
        await ref.ask(RemoveTemplate(view.digest), timeout_s=5)
        assert not await views(ref)
        with pytest.raises(Problem) as caught:
            await ref.ask(RemoveTemplate(view.digest), timeout_s=5)
        assert caught.value.status == 404


async def test_a_failed_build_is_reported_and_retried_after_a_pause(tmp_path: Path, builder: Builder) -> None:
    builder.outcome = TemplateFailed("guest_ended", "the guest panicked")
    builder.may_end.set()
    async with standing(tmp_path) as ref:
        with pytest.raises(Problem) as caught:
            await ref.ask(Build(SPEC), timeout_s=5)
        assert (caught.value.status, "the guest panicked" in caught.value.detail) == (503, True)
        assert (await until(ref, "failed")).error == "guest_ended: the guest panicked"
        ref.tell(Wanted(SPEC))
        await views(ref)
        assert builder.begun == 1, "it was tried a moment ago"
        builder.outcome = None
        assert (await ref.ask(Build(SPEC), timeout_s=5)).state == "ready", "a person need not wait"


async def test_a_template_whose_clone_failed_is_removed(tmp_path: Path, builder: Builder) -> None:
    builder.may_end.set()
    async with standing(tmp_path) as ref:
        await ref.ask(Build(SPEC), timeout_s=5)
        ref.tell(Suspect(KEY.digest, "clone_refused: no"))
        assert not await views(ref)
        assert not list((tmp_path / "t").iterdir())


async def test_nothing_is_built_when_templates_are_off(tmp_path: Path, builder: Builder) -> None:
    async with standing(tmp_path, enabled=False) as ref:
        ref.tell(Wanted(SPEC))
        with pytest.raises(Problem) as caught:
            await ref.ask(Build(SPEC), timeout_s=5)
        assert (caught.value.status, builder.begun) == (409, 0)


async def test_a_build_waits_for_a_slot_behind_all_vms(tmp_path: Path, builder: Builder) -> None:
    boot_slots = BootLimiter(1)
    await boot_slots.acquire(1)
    builder.may_end.set()
    async with standing(tmp_path, boot_slots=boot_slots) as ref, trio.open_nursery() as nursery:
        ref.tell(Wanted(SPEC))
        await until(ref, "waiting")
        with trio.fail_after(10):
            while boot_slots.inspect(SPEC.digest) is None:  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.start_soon(boot_slots.acquire, 2)
        await trio.testing.wait_all_tasks_blocked()
        boot_slots.release(1)
        assert boot_slots.inspect(2) == {"state": "booting", "limit": 1}
        assert boot_slots.inspect(SPEC.digest) == {"state": "waiting", "ahead": 0, "limit": 1}
        assert builder.begun == 0
        boot_slots.release(2)
        await until(ref, "ready")
        assert boot_slots.statistics() == {"limit": 1, "booting": 0, "waiting": 0}


async def test_a_build_that_hangs_releases_its_slot(
    tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_actor, "_SLOT_S", 0.05)
    boot_slots = BootLimiter(1)
    async with standing(tmp_path, boot_slots=boot_slots) as ref:
        ref.tell(Wanted(SPEC))
        await until(ref, "building")
        with trio.fail_after(10):
            await boot_slots.acquire(1)
        assert builder.under_way


async def test_no_build_runs_while_the_daemon_drains(tmp_path: Path, builder: Builder) -> None:
    projection = Projection()
    drain = Drain(since=datetime.now(UTC))
    boot_slots = BootLimiter(1, projection)
    async with standing(tmp_path, boot_slots=boot_slots, projection=projection) as ref, trio.open_nursery() as nursery:
        refused: list[Problem] = []

        async def ask() -> None:
            try:
                await ref.ask(Build(SPEC), timeout_s=5)
            except Problem as problem:
                refused.append(problem)

        nursery.start_soon(ask)
        await until(ref, "building")
        projection.set_drain(drain)
        await until(ref, "waiting")
        assert not builder.under_way
        nursery.start_soon(ask)
        await views(ref)
        await trio.testing.wait_all_tasks_blocked()
        assert [problem.code for problem in refused] == ["draining", "draining"]
        assert (builder.begun, boot_slots.statistics()["booting"]) == (1, 0)
        builder.may_end.set()
        projection.set_drain(None)
        await until(ref, "ready")
        assert builder.begun == 2


async def test_a_build_gives_way_to_a_vm_that_lacks_memory(tmp_path: Path, builder: Builder) -> None:
    async with standing(tmp_path) as ref:
        assert not await ref.ask(GiveWay(), timeout_s=5)
        ref.tell(Wanted(SPEC))
        await until(ref, "building")
        assert await ref.ask(GiveWay(), timeout_s=5)
        assert not builder.under_way
        assert (await until(ref, "failed")).error == "no_memory: a VM needed the memory"
        ref.tell(Wanted(SPEC))
        await views(ref)
        assert builder.begun == 1, "it was tried a moment ago"


async def test_files_of_an_interrupted_build_are_removed(tmp_path: Path, builder: Builder) -> None:
    del builder
    for path in (tmp_path / "t" / f"{KEY.digest}.new", tmp_path / "r" / "templates" / "x", tmp_path / "mem"):
        path.mkdir(parents=True)
    left, other = tmp_path / "mem" / "template-x.mem", tmp_path / "mem" / "7.mem"
    left.touch()
    other.touch()
    async with standing(tmp_path):
        with trio.fail_after(10):
            while left.exists() or (tmp_path / "r" / "templates").exists() or list((tmp_path / "t").iterdir()):  # noqa: ASYNC110
                await trio.sleep(0.01)
    assert other.exists()


async def test_files_on_the_disk_are_removed_after_a_reboot(tmp_path: Path, builder: Builder) -> None:
    del builder
    left = tmp_path / "t" / f"{KEY.digest}.new"
    left.mkdir(parents=True)
    async with standing(tmp_path):
        with trio.fail_after(10):
            while left.exists():  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_a_build_is_given_up_while_programs_wait_for_memory(
    tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_actor, "_LOOK_S", 0.01)
    async with standing(tmp_path) as ref:
        ref.tell(Wanted(SPEC))
        await until(ref, "building")
        monkeypatch.setattr(LinuxMachine, "is_short_of_memory", lambda self: True)
        assert (await until(ref, "failed")).error == "no_memory: programs wait for memory"
        assert not builder.under_way
