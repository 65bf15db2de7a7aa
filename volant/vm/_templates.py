"""The templates of VMs: chooses one for a boot, and learns from the boot's outcome."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from actors import ActorDown, AskTimeout, MailboxFull, Ref, Request
from volant.host import Host
from volant.hypervisor import Hypervisor
from volant.journal import CountBuild, Journal, Store, ask_journal
from volant.model import (
    NONE,
    Artifact,
    Boot,
    BuildTemplate,
    CreateVm,
    Key,
    Problem,
    Status,
    TemplateView,
    VmRow,
    mounts_of,
    new_row,
    no_such_plugin,
)
from volant.templates import GuestConfig, ReadyTemplate, TemplateKey, Templates, TemplateSpec, TemplateStore
from volant.templates.messages import Build, GiveWay, ListTemplates, RemoveTemplate, Suspect, Wanted

from ._boot_files import BootFiles
from ._layout import VmSettings
from ._machine_spec import guest_manifest, machine_spec, workload_spec
from .messages import StepError

R = TypeVar("R")
_ASK_S = 60.0
_BUILD_S = 300.0
"""Extra time for a template besides its guest's boot, as other builds may come first."""
_GIVE_WAY_S = 10.0
_SUSPECT = frozenset(
    {"template_refused", "clone_refused", "clone_timeout", "guest_panicked", "guest_reset", "hypervisor_exited"}
)
"""Failures of a clone that may be caused by the template and not by the host."""
_logger = logging.getLogger("volant.vm")


def _rootfs_of(boot: Boot) -> str | None:
    if boot.image is not None:
        return f"image {boot.image.digest}"
    return boot.rootfs.sha256 if boot.rootfs is not None else None


class VmTemplates(msgspec.Struct):
    """The templates of one daemon, for its VMs and for clients."""

    host: Host
    hypervisor: Hypervisor
    store: Store
    journal: Ref[Journal]
    template_store: TemplateStore
    builder: Ref[Templates]
    files: BootFiles
    settings: VmSettings

    def inspect(self) -> Mapping[str, object]:
        """Returns the state of the actor that builds templates, ready for JSON."""
        return self.builder.inspect()

    # For boots

    async def find(self, row: VmRow, image: str) -> tuple[ReadyTemplate, TemplateSpec] | None:
        """Returns the template for a VM; None if it boots cold.

        :raises StepError: `template_failed`, the VM must be a clone, and there is no template.
        """
        if mounts_of(row):
            # A template's machine has no devices for them.
            return None
        if row.boot == "cold" or row.fallback is not None or (row.boot == "auto" and not self.template_store.enabled):
            return None
        try:
            spec = await self.spec(row, image)
            found = await self.template_store.find(spec.key, spec.digest)
            if found is None and row.boot == "template":
                await self._wait_for_build(spec)
                found = await self.template_store.find(spec.key, spec.digest)
        except (OSError, Problem, ActorDown, AskTimeout) as error:
            if row.boot == "auto":
                return None
            why = error.detail if isinstance(error, Problem) else str(error)
            raise StepError("template_failed", f"the VM must boot from a template, and there is none: {why}") from error
        if found is None and row.boot == "template":
            raise StepError("template_failed", "the VM must boot from a template, which was built and is gone again")
        return None if found is None else (found, spec)

    async def spec(self, row: VmRow, image: str) -> TemplateSpec:
        """Returns the template for such a VM. The files of its boot are in the cache. :raises OSError: they are not."""
        accelerator = await self.hypervisor.accelerator()
        machine = machine_spec(self.settings, msgspec.structs.replace(row, image=image), accelerator)
        boot = row.manifest.boot or Boot()

        def part(artifact: Artifact | None, path: Path | None) -> str:
            if artifact is not None:
                return f"sha256 {artifact.sha256}"
            return f"image {image}" if path is None else f"file {path} {self.host.files.fingerprint(path)}"

        workload = workload_spec(row)
        config = None
        # A workload that runs already can't get the variables of its VM's secrets.
        has_secrets = bool(row.secret_env or row.secrets)
        if row.manifest.template.after == "workload" and workload is not None and not has_secrets:
            config = GuestConfig(guest_manifest(row), workload)
        key = TemplateKey(
            hypervisor=await self.hypervisor.fingerprint(),
            kernel=part(boot.kernel, self.settings.kernel),
            initramfs=part(boot.initramfs, self.settings.initramfs),
            rootfs=_rootfs_of(boot),
            cmdline=machine.cmdline,
            cpu_cores=row.cpu_cores,
            memory_mb=row.memory_mb,
            disk_mb=row.disk_mb,
            config=config,
            has_nic=row.network != NONE,
        )
        return TemplateSpec(
            key=key,
            digest=key.digest,
            plugin=row.source,
            kernel=machine.kernel,
            initramfs=machine.initramfs,
            rootfs=None if machine.root is None else machine.root.base,
            image=None if machine.root is None else machine.root.image,
            accelerator=accelerator,
        )

    async def give_way(self) -> bool:
        """Aborts a running build because a VM lacks memory; returns whether there was one."""
        with suppress(ActorDown, AskTimeout):
            return await self.builder.ask(GiveWay(), timeout_s=_GIVE_WAY_S)
        return False

    def note_clone(self, before: VmRow, after: VmRow, *, adopted: bool) -> None:
        """Learns from a step of a boot whether its template works. `adopted` means that an earlier incarnation began
        the boot."""
        template = before.template
        if before.status is not Status.STARTING or before.checkpoint is not None or template is None:
            return
        if after.status is Status.RUNNING:
            self.template_store.count_clone(template)
            return
        failed = after.fallback if after.status is Status.STARTING else after.reason
        if failed is None or failed is before.fallback:
            return
        if after.status is Status.STARTING:
            self.store.figures.fallbacks[failed.code] += 1
            _logger.warning(
                "VM %s boots cold, as the clone of template %s failed: %s: %s",
                after.name, template, failed.code, failed.message, extra={"vm": after.name},
            )  # fmt: skip
        if failed.code in _SUSPECT and not adopted:
            self._tell(Suspect(template, f"{failed.code}: {failed.message}"))

    def is_wanted(self, before: VmRow, after: VmRow) -> bool:
        """Returns whether a VM has just booted cold and the next one like it should be a clone."""
        return (
            (before.status, after.status) == (Status.STARTING, Status.RUNNING)
            and before.checkpoint is None
            and after.template is None
            and after.boot == "auto"
            and not mounts_of(after)
            and self.template_store.enabled
        )

    async def want(self, row: VmRow) -> None:
        """Requests the template of such a VM, unless it exists."""
        with suppress(OSError):
            spec = await self.spec(row, row.image or "")
            if await self.template_store.find(spec.key, spec.digest) is None:
                self._tell(Wanted(spec))

    def _tell(self, message: Wanted | Suspect) -> None:
        # If it is lost, the next VM's boot sends it again.
        with suppress(ActorDown, MailboxFull):
            self.builder.tell(message)

    async def _wait_for_build(self, spec: TemplateSpec) -> None:
        """Waits for a template, and before that for the end of a drain. Raises Problem, ActorDown, AskTimeout."""
        while True:
            await self.store.projection.undrained()
            try:
                await self.builder.ask(Build(spec), timeout_s=self.settings.agent_timeout_s + _BUILD_S)
                return
            except Problem as problem:
                if problem.code != "draining":
                    raise

    # For clients

    async def list(self) -> tuple[TemplateView, ...]:
        """Returns all templates, including those that are being built or that failed. :raises Problem: 503."""
        return tuple(map(self._without_directories, await self._ask(ListTemplates())))

    async def build(self, request: BuildTemplate, project: str) -> TemplateView:
        """Returns the template that such VMs begin with, once it is built. A cancelled caller cancels nothing.

        :raises Problem: 400; 404 no such plugin; 409 templates are off, or `quota-exceeded`; 422, 429 as for a VM; 503
            it can't be built.
        """
        plugin = self.store.projection.plugin(Key(project, request.plugin))
        owner = self.store.projection.project(project)
        if plugin is None or owner is None:
            raise no_such_plugin(request.plugin)
        like = CreateVm(
            name="template",
            cpu_cores=request.cpu_cores,
            memory_mb=request.memory_mb,
            plugin=request.plugin,
            kernel_cmdline=request.kernel_cmdline,
            env=request.env,
            disk_mb=request.disk_mb,
            network=request.network,
        )
        now, networking = self.host.clock.now(), self.store.networking
        row = new_row(
            like, plugin.manifest, project=project, project_egress=owner.egress, vm_id=0, now=now, networking=networking
        )
        try:
            spec = await self.spec(row, await self.files.fetch(row))
            if self.template_store.enabled and await self.template_store.find(spec.key, spec.digest) is None:
                await ask_journal(self.journal, CountBuild(row))
        except (StepError, OSError) as error:
            raise Problem(503, "template-failed", f"the template can't be built: {error}") from error
        return await self._ask(Build(spec), self.settings.agent_timeout_s + _BUILD_S)

    async def remove(self, digest: str) -> None:
        """Removes a template. VMs cloned from it keep running. :raises Problem: 404, 503."""
        await self._ask(RemoveTemplate(digest))

    def _without_directories(self, view: TemplateView) -> TemplateView:
        if view.error is None:
            return view
        return msgspec.structs.replace(view, error=self.settings.without_directories(view.error))

    async def _ask(self, message: Request[R], timeout_s: float = _ASK_S) -> R:
        try:
            return await self.builder.ask(message, timeout_s=timeout_s)
        except (ActorDown, AskTimeout) as error:
            raise Problem(503, "templates-down", f"the actor 'templates' does not answer: {error}") from error
