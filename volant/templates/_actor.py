"""The actor `templates`: builds templates for future clones, one at a time, and evicts unused ones.

Only a client that requested a template waits for it. VMs search the store themselves, and boot cold if it has no
template for them. So a failure here costs time, but no VM.

A build is a boot, and waits for a boot slot behind all VMs. A build that runs when the daemon begins to drain is
aborted, as the host should be quiet, and starts again afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Literal, Protocol

import msgspec
import trio

from actors import Actor, Deferred, handles
from volant.concurrency import Backoff
from volant.host import Host
from volant.journal import Projection
from volant.model import Problem, TemplateView, draining

from ._builder import TemplateBuilder
from ._guest import TemplateFailed
from ._key import TemplateKey, TemplateSpec
from ._store import TemplateRecord, TemplateStore
from ._warm_pool import WarmCounts, WarmPool
from .messages import Build, GiveWay, ListTemplates, RemoveTemplate, Suspect, Wanted

QUEUE = 16
"""Maximum number of waiting templates. The next VM requests a refused one again."""
_QUIET_S = 1.0
"""How long a VM that has just booted has the host to itself."""
_SLOT_S = 30.0
"""How long a build holds its slot, the same as for a VM: longer than a boot takes. A slower build continues without a
slot."""
_LOOK_S = 1.0
"""The interval of checks of the host's memory during a build."""
_RETRY_S, _RETRY_MAX_S = 30.0, 3600.0
_FAILURES = 64
_EVICT_EVERY_S = 3600.0
_logger = logging.getLogger("volant.templates")


class _Job(msgspec.Struct):
    spec: TemplateSpec
    waiting: list[Deferred[TemplateView]] = msgspec.field(default_factory=list)


class _Failure(msgspec.Struct):
    spec: TemplateSpec | None
    backoff: Backoff
    until: float
    message: str
    at: datetime


class BootSlots(Protocol):
    """Limits the number of concurrent boots: see `volant.vm.BootLimiter`."""

    async def acquire(self, boot: str, *, last: bool = False) -> None:
        """Waits for a slot. With `last`, behind all that wait without it."""

    def release(self, boot: str) -> None:
        """Gives the slot back."""


class Templates(Actor):
    """The actor; see `volant.templates.messages` for its messages."""

    mailbox = 256

    def __init__(
        self,
        host: Host,
        store: TemplateStore,
        builder: TemplateBuilder,
        warm_pool: WarmPool,
        boot_slots: BootSlots,
        projection: Projection,
        *,
        max_bytes: int,
        max_age: timedelta,
    ) -> None:
        self._host = host
        self._store = store
        self._builder = builder
        self._warm_pool = warm_pool
        self._boot_slots = boot_slots
        self._projection = projection
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._jobs: dict[str, _Job] = {}
        """The builds in order; the first may be running."""
        self._building: str | None = None
        self._scope: trio.CancelScope | None = None
        """Cancels the running build."""
        self._give_way: list[Deferred[bool]] = []
        """VMs that wait for its end, as they need its memory."""
        self._failures: dict[str, _Failure] = {}
        self._wake = trio.Event()
        self._built = 0

    async def on_start(self) -> None:
        self.ctx.spawn(self._work, name="builder")
        self.ctx.spawn(self._warm_pool.keep, name="standby")

    def inspect(self) -> Mapping[str, object]:
        return {
            "building": self._building,
            "waiting": [digest for digest in self._jobs if digest != self._building],
            "built": self._built,
            "failures": {digest: failure.message for digest, failure in self._failures.items()},
            "standby": self._warm_pool.statistics(),
        }

    @handles(Wanted)
    async def wanted(self, message: Wanted) -> None:
        spec = message.spec
        failure = self._failures.get(spec.digest)
        if not self._store.enabled or spec.digest in self._jobs or len(self._jobs) >= QUEUE:
            return
        if failure is not None and trio.current_time() < failure.until:
            return
        self._enqueue(_Job(spec))

    @handles(Build)
    async def build(self, message: Build) -> Deferred[TemplateView]:
        deferred = self.ctx.defer(message)
        digest, drain = message.spec.digest, self._projection.drain
        if drain is not None:
            deferred.fail(draining(drain))
        elif not self._store.enabled:
            deferred.fail(
                Problem(409, "templates-off", "there are no templates here, as the setting `templates` is `off`")
            )
        elif digest in self._jobs:
            self._jobs[digest].waiting.append(deferred)
        elif len(self._jobs) >= QUEUE:
            deferred.fail(
                Problem(503, "templates-busy", f"{len(self._jobs)} templates wait to be built", hint="try again later")
            )
        else:
            self._enqueue(_Job(message.spec, [deferred]))
        return deferred

    @handles(GiveWay)
    async def give_way(self, message: GiveWay) -> Deferred[bool]:
        deferred = self.ctx.defer(message)
        if self._scope is None:
            deferred.reply(False)
        else:
            self._give_way.append(deferred)
            self._scope.cancel()
        return deferred

    @handles(Suspect)
    async def suspect(self, message: Suspect) -> None:
        """Removes the template, as it would make the next clone fail too. It is built again after some time."""
        _logger.warning("template %s is removed, as a clone of it failed: %s", message.digest, message.reason)
        self._note_failure(message.digest, None, f"a clone of it failed: {message.reason}")
        try:
            await self._store.remove(message.digest)
        except OSError as error:
            _logger.error("template %s can't be removed: %s", message.digest, error)

    @handles(ListTemplates)
    async def all(self, message: ListTemplates) -> tuple[TemplateView, ...]:
        del message
        store = self._store
        views = {
            digest: self._ready(digest, stored, await store.used_at(digest, stored))
            for digest, stored in (await store.all()).items()
        }
        for digest, failure in self._failures.items():
            if digest not in views and failure.spec is not None:
                views[digest] = _view(failure.spec, "failed", failure.at, failure.message)
        now = self._host.clock.now()
        for digest, job in self._jobs.items():
            views[digest] = _view(job.spec, "building" if digest == self._building else "waiting", now)
        return tuple(views[digest] for digest in sorted(views))

    @handles(RemoveTemplate)
    async def remove(self, message: RemoveTemplate) -> None:
        if message.digest not in await self._store.all():
            raise Problem(404, "template-not-found", f"there is no template {message.digest[:40]!r}")
        try:
            await self._store.remove(message.digest)
        except OSError as error:
            raise Problem(503, "template-not-removed", f"the template can't be removed: {error}") from error

    def _enqueue(self, job: _Job) -> None:
        self._jobs[job.spec.digest] = job
        self._wake.set()

    async def _work(self) -> None:
        """Builds one template after the other, and evicts in between."""
        try:
            await self._builder.sweep()
        except OSError as error:
            _logger.error("files of an interrupted build can't be removed: %s", error)
        while True:
            await self._evict()
            with trio.move_on_after(_EVICT_EVERY_S):
                await self._wake.wait()
            while self._jobs:
                await self._do(self._next())
            self._wake = trio.Event()

    def _next(self) -> str:
        """Returns the digest of the next build: one that a client waits for comes first."""
        return next((digest for digest, job in self._jobs.items() if job.waiting), next(iter(self._jobs)))

    async def _do(self, digest: str) -> None:
        job = self._jobs[digest]
        spec = job.spec
        try:
            if await self._store.find(spec.key, digest) is None:
                if not job.waiting:
                    await trio.sleep(_QUIET_S)
                if not await self._build_in_slot(job):
                    return self._give_up(job)
                self._warm_pool.expect(spec)
            stored = (await self._store.all())[digest]
        except (TemplateFailed, OSError, KeyError) as error:
            code = error.code if isinstance(error, TemplateFailed) else "io_error"
            self._note_failure(digest, spec, f"{code}: {error}")
            _logger.warning("template %s for plugin %s could not be built: %s", digest, spec.plugin, error)
            for waiting in self._jobs.pop(digest).waiting:
                waiting.fail(Problem(503, "template-failed", f"the template can't be built: {error}"))
            return
        self._failures.pop(digest, None)
        for waiting in self._jobs.pop(digest).waiting:
            waiting.reply(self._ready(digest, stored, stored.created_at))
        await self._evict()

    async def _build_in_slot(self, job: _Job) -> bool:
        """Returns whether the template was built; False if the daemon drains. :raises TemplateFailed: :raises
        OSError:"""
        spec, digest = job.spec, job.spec.digest
        built = False
        failure: TemplateFailed | OSError | None = None
        is_short = False

        async def end_slot() -> None:
            await trio.sleep(_SLOT_S)
            self._boot_slots.release(digest)

        async def end_for_drain(scope: trio.CancelScope) -> None:
            await self._projection.drain_is_not(None)
            scope.cancel()

        async def end_when_short(scope: trio.CancelScope) -> None:
            nonlocal is_short
            while not is_short:
                await trio.sleep(_LOOK_S)
                # Without descriptors, say, nothing is known.
                with suppress(OSError):
                    is_short = self._host.machine.is_short_of_memory()
            scope.cancel()

        try:
            # Behind all VMs, unless a client waits for it.
            await self._boot_slots.acquire(digest, last=not job.waiting)
            self._building = digest
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end_slot)
                nursery.start_soon(end_for_drain, nursery.cancel_scope)
                nursery.start_soon(end_when_short, nursery.cancel_scope)
                self._scope = nursery.cancel_scope
                try:
                    await self._builder.build(spec)
                    built = True
                except (TemplateFailed, OSError) as error:
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            self._boot_slots.release(digest)
            self._building = self._scope = None
            gave_way, self._give_way = self._give_way, []
            for each in gave_way:
                each.reply(True)
        if gave_way and not built:
            failure = TemplateFailed("no_memory", "a VM needed the memory")
        if is_short and not built:
            failure = TemplateFailed("no_memory", "programs wait for memory")
        if failure is not None:
            raise failure
        if built:
            self._built += 1
            took_s = trio.current_time() - began
            _logger.info("template %s for plugin %s: built in %.1f s", digest, spec.plugin, took_s)
        return built

    def _give_up(self, job: _Job) -> None:
        """Answers the waiting clients that the daemon drains. The template is built afterwards."""
        drain = self._projection.drain
        waiting, job.waiting = job.waiting, []
        for each in waiting:
            each.fail(Problem(503, "draining", "the daemon drains") if drain is None else draining(drain))

    async def _evict(self) -> None:
        try:
            await self._store.evict(self._max_bytes, self._max_age)
        except OSError as error:
            _logger.error("a template can't be removed: %s", error)

    def _note_failure(self, digest: str, spec: TemplateSpec | None, message: str) -> None:
        before = self._failures.pop(digest, None)
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S) if before is None else before.backoff
        if spec is None and before is not None:
            spec = before.spec
        until, now = trio.current_time() + backoff.take(), self._host.clock.now()
        self._failures[digest] = _Failure(spec, backoff, until, message, now)
        while len(self._failures) > _FAILURES:
            del self._failures[next(iter(self._failures))]

    def _ready(self, digest: str, stored: TemplateRecord, used_at: datetime) -> TemplateView:
        counts = self._warm_pool.counts.get(digest, WarmCounts())
        return TemplateView(
            digest=digest,
            state="ready",
            plugin=stored.plugin,
            after=_after(stored.key),
            cpu_cores=stored.key.cpu_cores,
            memory_mb=stored.key.memory_mb,
            disk=stored.key.rootfs is not None,
            size_bytes=stored.size_bytes,
            created_at=stored.created_at,
            used_at=used_at,
            clones=self._store.clones.get(digest, 0),
            warm=self._warm_pool.waiting(digest),
            warm_hits=counts.hits,
            warm_misses=counts.misses,
            error=None,
        )


def _view(
    spec: TemplateSpec, state: Literal["building", "waiting", "failed"], at: datetime, error: str | None = None
) -> TemplateView:
    key = spec.key
    return TemplateView(
        digest=spec.digest,
        state=state,
        plugin=spec.plugin,
        after=_after(key),
        cpu_cores=key.cpu_cores,
        memory_mb=key.memory_mb,
        disk=key.rootfs is not None,
        size_bytes=0,
        created_at=at,
        used_at=None,
        clones=0,
        error=error,
    )


def _after(key: TemplateKey) -> Literal["agent", "workload"]:
    return "agent" if key.config is None else "workload"
