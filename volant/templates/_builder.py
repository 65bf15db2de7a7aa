"""Builds a template: boots a machine of the daemon's own, and saves it once it is idle.

Whatever happens half-way, the process, its directory, its memory and the half-made template have names that follow from
the digest, and no row. So whoever begins after a daemon that was killed finds all of it without having been told.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from volant.channel import AgentClient, VirtioSerial, open_channel
from volant.host import Host
from volant.hypervisor import Disk, Hypervisor, HypervisorError, LaunchFailed, MachineSpec, Nic, Template
from volant.journal import Projection
from volant.model.agent import DAEMON_MANIFEST, DAEMON_ROOT, DAEMON_SETTLE, DAEMON_WORKLOAD, HEALTHZ

from ._ask import TemplateFailed, ask, while_it_lives
from ._key import GuestConfig, TemplateKey, TemplateSpec
from ._store import LAYER, MEMORY, STATE, TemplateStore

RESERVE_MB = 384
"""What the host must have beyond the memory of the guest that boots: what its hypervisor takes, and as much again."""
_ROOT_S = 20.0
_SETTLE_S = 30.0
_TRIAL_S = 30.0
_AGAIN_S = 0.2
_WORKLOAD_AGAIN_S = 0.25
_COPY_S = 120.0
_KILL_S = 10.0
_CLEAR_S = 20.0
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_logger = logging.getLogger("volant.templates")


class BootSlots(Protocol):
    """Who may boot: see `volant.vm.BootLimiter`."""

    async def acquire(self, who: str, *, last: bool = False) -> None:
        """Wait for a turn."""

    def release(self, who: str) -> None:
        """It is over."""


@dataclass(frozen=True, kw_only=True)
class BuildDoors:
    """What a build uses of the rest of the daemon."""

    host: Host
    hypervisor: Hypervisor
    store: TemplateStore
    boot_slots: BootSlots
    projection: Projection
    """Knows whether the daemon drains."""
    instance: str
    runtime_dir: Path
    memory_dir: Path
    agent_timeout_s: float = 120.0


def template_tag_prefix(instance: str) -> str:
    """What the tags of processes begin with that become templates, and those of no VM do."""
    return f"volant-{instance}-t."


async def build(doors: BuildDoors, template_spec: TemplateSpec) -> None:
    """Make a template; the store has it afterwards. Cancelled, it leaves nothing.

    :raises TemplateFailed: nothing is left of it.
    """
    host = doors.host
    spec = _spec(doors, template_spec)
    fresh = doors.store.directory / f"{template_spec.digest}.new"
    _check_room(doors, template_spec)
    try:
        await _clear(host, spec, fresh)
        await host.files.mkdir(fresh)
        try:
            if spec.root is not None:
                await doors.hypervisor.make_layer(spec.root)
            identity = await doors.hypervisor.launch(spec)
            async with doors.hypervisor.attach(spec, identity) as machine:
                await while_it_lives(
                    machine, partial(_bring_up, host, spec, template_spec.key.config), doors.agent_timeout_s
                )
                await machine.save(fresh / f"{STATE}.part")
                await machine.quit()
            await host.files.put_in_place(fresh / f"{STATE}.part", fresh / STATE)
            if spec.root is not None:
                await host.files.put_in_place(spec.root.layer, fresh / LAYER)
            await _copy_memory(host, spec.memory_file, fresh / MEMORY)
            protocol = await _try(doors, spec, fresh)
            await doors.store.add(fresh, template_spec.digest, template_spec.key, template_spec.plugin, protocol)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAR_S):
                await _clear(host, spec, fresh)
    except LaunchFailed as error:
        raise TemplateFailed(error.code, error.message) from error
    except HypervisorError as error:
        raise TemplateFailed("hypervisor_error", str(error)) from error
    except OSError as error:
        raise TemplateFailed("io_error", f"the template can't be written: {error}") from error


async def sweep(doors: BuildDoors) -> None:
    """End what builds of an earlier life have left: processes, their files, half-made templates. Raises OSError."""
    host = doors.host
    found = await host.processes.scan(template_tag_prefix(doors.instance))
    for identity in found:
        _logger.info("process %d was to become a template (%s), and is ended", identity.pid, identity.tag)
    with trio.move_on_after(_KILL_S):
        # One that has just been started still makes its files.
        await host.processes.end(found)
    await host.files.remove_tree(_directories(doors))
    # After a reboot of the host there is none.
    for name in host.files.names(doors.memory_dir) if host.files.exists(doors.memory_dir) else ():
        if name.startswith(_MEMORY_PREFIX):
            await host.files.remove(doors.memory_dir / name)
    await doors.store.sweep()


_MEMORY_PREFIX = "template-"
_MAC = "02:00:00:00:00:01"
"""Of a NIC that is connected to nothing, in a guest that does not use it."""


def unconnected_nic(key: TemplateKey) -> Nic | None:
    """The NIC of a machine that is nobody's VM."""
    return Nic(mac=_MAC) if key.has_nic else None


def _directories(doors: BuildDoors) -> Path:
    return doors.runtime_dir / "templates"


def _spec(doors: BuildDoors, template_spec: TemplateSpec) -> MachineSpec:
    key, name = template_spec.key, template_spec.digest[:16]
    fresh = doors.store.directory / f"{template_spec.digest}.new"
    return MachineSpec(
        vm_id=0,
        name="",
        cpu_cores=key.cpu_cores,
        memory_mb=key.memory_mb,
        kernel=template_spec.kernel,
        initramfs=template_spec.initramfs,
        cmdline=key.cmdline,
        directory=_directories(doors) / name,
        memory_file=doors.memory_dir / f"{_MEMORY_PREFIX}{name}.mem",
        tag=f"{template_tag_prefix(doors.instance)}{name}",
        accelerator=template_spec.accelerator,
        root=None if template_spec.rootfs is None else Disk(template_spec.rootfs, fresh / f"{LAYER}.part", key.disk_mb),
        nic=unconnected_nic(key),
        in_background=True,
    )


def _check_room(doors: BuildDoors, template_spec: TemplateSpec) -> None:
    """:raises TemplateFailed: the host has better things to do with its memory or its disk."""
    memory_mb = template_spec.key.memory_mb
    available_mb = doors.host.machine.spare_memory_mb(doors.memory_dir)
    if available_mb < memory_mb + RESERVE_MB:
        raise TemplateFailed("no_memory", f"{available_mb} MiB of memory are left, and a build may not take the last")
    try:
        free_mb = doors.host.disk.free(doors.store.directory) // 2**20
    except OSError as error:
        raise TemplateFailed("io_error", f"{doors.store.directory} can't be looked at: {error}") from error
    if free_mb < memory_mb + RESERVE_MB:
        raise TemplateFailed("no_space", f"{free_mb} MiB of the disk are left, and a build may not take the last")


async def _try(doors: BuildDoors, spec: MachineSpec, fresh: Path) -> int:
    """Prove the template by a clone of it: what does not go on once, never does. The newest protocol that it speaks.

    :raises TemplateFailed:
    """
    host = doors.host
    await _end(host, spec)
    root = None
    if spec.root is not None:
        root = Disk(spec.root.base, fresh / "trial.qcow2")
        await doors.hypervisor.make_layer(root, fresh / LAYER)
    trial = msgspec.structs.replace(spec, root=root, template=Template(fresh / MEMORY, fresh / STATE))
    await doors.hypervisor.launch(trial)
    protocol: object = None
    with trio.move_on_after(_TRIAL_S) as patience:
        async with open_channel(host, VirtioSerial(trial.agent_path)) as channel:
            protocol = (await ask(AgentClient(channel), "GET", HEALTHZ, timeout_s=_TRIAL_S)).get("protocol")
    if patience.cancelled_caught:
        raise TemplateFailed("clone_timeout", f"a clone of it did not answer within {_TRIAL_S:g} s")
    await _end(host, trial)
    if root is not None:
        await host.files.remove(root.layer)
    return protocol if type(protocol) is int else 1


async def _bring_up(host: Host, spec: MachineSpec, config: GuestConfig | None) -> None:
    """Wait until the guest is what clones are to begin with; nobody is connected to it afterwards.

    :raises TemplateFailed:
    """
    async with open_channel(host, VirtioSerial(spec.agent_path)) as channel:
        client = AgentClient(channel)
        # The agent waits, for as long as a guest should need.
        while (state := (await ask(client, "GET", DAEMON_ROOT, timeout_s=_ROOT_S)).get("state")) == "pending":  # noqa: ASYNC110
            await trio.sleep(_AGAIN_S)
        if state != ("none" if spec.root is None else "mounted"):
            raise TemplateFailed("rootfs_failed", "the guest can't mount its root filesystem")
        if config is not None:
            await ask(client, "PUT", DAEMON_MANIFEST, config.manifest)
            status = await ask(client, "PUT", DAEMON_WORKLOAD, config.workload)
            while status.get("state") != "healthy":
                if status.get("state") in ("failed", "exited"):
                    raise TemplateFailed("workload_failed", f"the workload does not run: {status.get('error')}"[:500])
                await trio.sleep(_WORKLOAD_AGAIN_S)
                status = await ask(client, "GET", DAEMON_WORKLOAD)
        await ask(client, "POST", DAEMON_SETTLE, timeout_s=_SETTLE_S)


async def _copy_memory(host: Host, source: Path, target: Path) -> None:
    """Without its pages of zeros, and in a process of its own, as it is a lot to look at. :raises TemplateFailed:"""
    part = target.with_name(f"{target.name}.part")
    command = ["cp", "--sparse=always", "--", str(source), str(part)]
    try:
        status, said = await host.processes.run(command, env=_ENVIRONMENT, cwd=target.parent, timeout_s=_COPY_S)
    except trio.TooSlowError:
        raise TemplateFailed("io_error", f"the guest's memory was not copied within {_COPY_S:g} s") from None
    if status != 0:
        raise TemplateFailed("io_error", f"the guest's memory can't be copied: {said.decode(errors='replace')[-300:]}")
    await host.files.put_in_place(part, target)


async def _clear(host: Host, spec: MachineSpec, fresh: Path) -> None:
    """Leave no process and no file of a build. :raises TemplateFailed: the process does not go. Raises OSError."""
    try:
        await _end(host, spec)
    finally:
        await host.files.remove_tree(fresh)


async def _end(host: Host, spec: MachineSpec) -> None:
    """Leave no process of a build, and nothing of its memory. :raises TemplateFailed: it does not go, although killed;
    its files are gone then, too. Raises OSError."""
    with trio.move_on_after(_KILL_S) as patience:
        await host.processes.end_all(spec.tag)
    for path in (spec.directory, spec.memory_file):
        await host.files.remove_tree(path)
    if patience.cancelled_caught:
        raise TemplateFailed("unkillable", "the hypervisor's process does not end, although killed")
