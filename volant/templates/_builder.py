"""Builds a template: boots a machine without a VM, and saves it once it is idle.

The process, its directory, its memory and the unfinished template have no row, but names that follow from the digest.
So a daemon that starts after a killed one finds all remains of a build.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import msgspec
import trio

from volant.channel import AgentClient, VirtioSerial, open_channel
from volant.host import CopyFailed, Host, copy_sparsely
from volant.hypervisor import Disk, Hypervisor, HypervisorError, LaunchFailed, MachineSpec, Nic, Template
from volant.model.agent import DAEMON_MANIFEST, DAEMON_ROOT, DAEMON_SETTLE, DAEMON_WORKLOAD, HEALTHZ
from volant.store import fresh as fresh_name

from ._guest import TemplateFailed, ask, while_alive
from ._key import GuestConfig, TemplateSpec
from ._store import LAYER, MEMORY, STATE, TemplateStore

RESERVE_MB = 384
"""Memory to leave free beyond the memory of the booting guest: the use of its hypervisor, and as much again."""
_ROOT_S = 20.0
_SETTLE_S = 30.0
_TRIAL_S = 30.0
_RETRY_S = 0.2
_WORKLOAD_RETRY_S = 0.25
_COPY_S = 120.0
_KILL_S = 10.0
_CLEAR_S = 20.0
_MEMORY_PREFIX = "template-"
_MAC = "02:00:00:00:00:01"
"""The MAC of an unconnected NIC, in a guest that does not use it."""
_logger = logging.getLogger("volant.templates")


def template_tag_prefix(instance: str) -> str:
    """Returns the prefix of the process tags of builds, which tags of VMs never have."""
    return f"volant-{instance}-t."


def machine_of(wanted: TemplateSpec, *, directory: Path, memory_file: Path, tag: str, layer: Path) -> MachineSpec:
    """Returns a machine for a template, which belongs to no VM."""
    key = wanted.key
    return MachineSpec(
        vm_id=0,
        name="",
        cpu_cores=key.cpu_cores,
        memory_mb=key.memory_mb,
        kernel=wanted.kernel,
        initramfs=wanted.initramfs,
        cmdline=key.cmdline,
        directory=directory,
        memory_file=memory_file,
        tag=tag,
        accelerator=wanted.accelerator,
        root=None if key.rootfs is None else Disk(wanted.rootfs, layer, key.disk_mb, wanted.image),
        nic=Nic(mac=_MAC) if key.has_nic else None,
    )


class TemplateBuilder:
    """Builds templates into a store."""

    def __init__(
        self,
        host: Host,
        hypervisor: Hypervisor,
        store: TemplateStore,
        *,
        instance: str,
        runtime_dir: Path,
        memory_dir: Path,
        agent_timeout_s: float = 120.0,
    ) -> None:
        self._host = host
        self._hypervisor = hypervisor
        self._store = store
        self._instance = instance
        self._directory = runtime_dir / "templates"
        self._memory_dir = memory_dir
        self._agent_timeout_s = agent_timeout_s

    async def build(self, wanted: TemplateSpec) -> None:
        """Builds a template into the store. When cancelled, it leaves nothing.

        :raises TemplateFailed: nothing is left of it.
        """
        host, hypervisor = self._host, self._hypervisor
        fresh = self._fresh(wanted)
        spec = self._machine(wanted, fresh)
        self._check_room(wanted.key.memory_mb)
        try:
            await self._clear(spec, fresh)
            await host.files.mkdir(fresh)
            try:
                if spec.root is not None:
                    await hypervisor.make_layer(spec.root)
                identity = await hypervisor.launch(spec)
                async with hypervisor.attach(spec, identity) as machine:
                    await while_alive(machine, partial(self._set_up, spec, wanted.key.config), self._agent_timeout_s)
                    await machine.save(fresh / f"{STATE}.part")
                    await machine.quit()
                await host.files.put_in_place(fresh / f"{STATE}.part", fresh / STATE)
                if spec.root is not None:
                    await host.files.put_in_place(spec.root.layer, fresh / LAYER)
                await copy_sparsely(host, spec.memory_file, fresh / MEMORY, _COPY_S)
                protocol = await self._try(spec, fresh)
                await self._store.add(fresh, wanted.digest, wanted.key, wanted.plugin, protocol)
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAR_S):
                    await self._clear(spec, fresh)
        except LaunchFailed as error:
            raise TemplateFailed(error.code, error.message) from error
        except HypervisorError as error:
            raise TemplateFailed("hypervisor_error", str(error)) from error
        except CopyFailed as error:
            raise TemplateFailed("io_error", f"the guest's memory can't be copied: {error}") from error
        except OSError as error:
            raise TemplateFailed("io_error", f"the template can't be written: {error}") from error

    async def sweep(self) -> None:
        """Removes the remains of an earlier daemon's builds: processes, their files, unfinished templates.

        :raises OSError:
        """
        host = self._host
        found = await host.processes.scan(template_tag_prefix(self._instance))
        for identity in found:
            _logger.info("process %d of a build that was interrupted (%s) is ended", identity.pid, identity.tag)
        with trio.move_on_after(_KILL_S):
            # First, as one that has just been started still makes its files.
            await host.processes.end(found)
        await host.files.remove_tree(self._directory)
        # After a reboot of the host there is no such directory.
        for name in host.files.names(self._memory_dir) if host.files.exists(self._memory_dir) else ():
            if name.startswith(_MEMORY_PREFIX):
                await host.files.remove(self._memory_dir / name)
        await self._store.sweep()

    def _fresh(self, wanted: TemplateSpec) -> Path:
        return fresh_name(self._store.directory / wanted.digest)

    def _machine(self, wanted: TemplateSpec, fresh: Path) -> MachineSpec:
        name = wanted.digest[:16]
        machine = machine_of(
            wanted,
            directory=self._directory / name,
            memory_file=self._memory_dir / f"{_MEMORY_PREFIX}{name}.mem",
            tag=f"{template_tag_prefix(self._instance)}{name}",
            layer=fresh / f"{LAYER}.part",
        )
        return msgspec.structs.replace(machine, in_background=True)

    def _check_room(self, memory_mb: int) -> None:
        """Checks that the host has room. :raises TemplateFailed: its memory, or its disk, is needed for something
        else."""
        if self._host.machine.is_short_of_memory():
            raise TemplateFailed("no_memory", "programs wait for memory")
        available_mb = self._host.machine.spare_memory_mb(self._memory_dir)
        if available_mb < memory_mb + RESERVE_MB:
            raise TemplateFailed(
                "no_memory", f"{available_mb} MiB of memory are left, and a build may not take the last"
            )
        directory = self._store.directory
        try:
            free_mb = self._host.disk.free(directory) // 2**20
        except OSError as error:
            raise TemplateFailed("io_error", f"{directory} can't be read: {error}") from error
        if free_mb < memory_mb + RESERVE_MB:
            raise TemplateFailed("no_space", f"{free_mb} MiB of the disk are left, and a build may not take the last")

    async def _set_up(self, spec: MachineSpec, config: GuestConfig | None) -> None:
        """Prepares the guest for its clones, and returns when its agent has no connection.

        :raises TemplateFailed:
        """
        async with open_channel(self._host, VirtioSerial(spec.agent_path)) as channel:
            client = AgentClient(channel)
            # The agent waits as long as a guest should need.
            while (state := (await ask(client, "GET", DAEMON_ROOT, timeout_s=_ROOT_S)).get("state")) == "pending":  # noqa: ASYNC110
                await trio.sleep(_RETRY_S)
            if state != ("none" if spec.root is None else "mounted"):
                raise TemplateFailed("rootfs_failed", "the guest can't mount its root filesystem")
            if config is not None:
                await ask(client, "PUT", DAEMON_MANIFEST, config.manifest)
                status = await ask(client, "PUT", DAEMON_WORKLOAD, config.workload)
                while status.get("state") != "healthy":
                    if status.get("state") in ("failed", "exited"):
                        why = f"the workload does not run: {status.get('error')}"
                        raise TemplateFailed("workload_failed", why[:500])
                    await trio.sleep(_WORKLOAD_RETRY_S)
                    status = await ask(client, "GET", DAEMON_WORKLOAD)
            await ask(client, "POST", DAEMON_SETTLE, timeout_s=_SETTLE_S)

    async def _try(self, spec: MachineSpec, fresh: Path) -> int:
        """Tests the template with a clone, and returns the newest protocol that the clone's agent supports.

        :raises TemplateFailed:
        """
        await self._end(spec)
        root = None
        if spec.root is not None:
            root = msgspec.structs.replace(spec.root, layer=fresh / "trial.qcow2")
            await self._hypervisor.make_layer(root, fresh / LAYER)
        trial = msgspec.structs.replace(spec, root=root, template=Template(fresh / MEMORY, fresh / STATE))
        await self._hypervisor.launch(trial)
        protocol: object = None
        with trio.move_on_after(_TRIAL_S) as scope:
            async with open_channel(self._host, VirtioSerial(trial.agent_path)) as channel:
                protocol = (await ask(AgentClient(channel), "GET", HEALTHZ, timeout_s=_TRIAL_S)).get("protocol")
        if scope.cancelled_caught:
            raise TemplateFailed("clone_timeout", f"a clone of it did not answer within {_TRIAL_S:g} s")
        await self._end(trial)
        if root is not None:
            await self._host.files.remove(root.layer)
        return protocol if type(protocol) is int else 1

    async def _clear(self, spec: MachineSpec, fresh: Path) -> None:
        """Removes the process and all files of a build. :raises TemplateFailed: see `_end`. :raises OSError:"""
        try:
            await self._end(spec)
        finally:
            await self._host.files.remove_tree(fresh)

    async def _end(self, spec: MachineSpec) -> None:
        """Ends the process of a build, and removes its memory.

        :raises TemplateFailed: it does not end, although killed; its files are still removed. :raises OSError:
        """
        with trio.move_on_after(_KILL_S) as scope:
            await self._host.processes.end_all(spec.tag)
        for path in (spec.directory, spec.memory_file):
            await self._host.files.remove_tree(path)
        if scope.cancelled_caught:
            raise TemplateFailed("unkillable", "the hypervisor's process does not end, although killed")
