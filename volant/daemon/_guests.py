"""The host goes down: its guests are asked to shut down, some at a time, and only then are their processes killed.

A program of its own, that the unit `volant-guests.service` runs when it is stopped, which is after the daemon has
stopped and before systemd kills the VMs' scopes. So it does its work too when the daemon had crashed or was stopped
long before, it never runs on a restart of the daemon, and nobody has to guess what a SIGTERM means.

**It writes nothing down.** What it leaves is what a power cut leaves: rows of VMs that should run, with processes of
another boot. So there is one way up again after both. Rejected: to stop them as a client would, after which nobody
could tell those that should run from those that somebody has stopped. It does not open the database at all: the
processes carry their VM's id in their tag, and a database that is broken is no reason to cut guests' power.
"""

from __future__ import annotations

import logging
import math
from contextlib import suppress

import trio

from volant.channel import AgentClient, AgentProtocolError, AgentUnreachable, VirtioSerial, open_channel
from volant.host import Host, ProcessGone
from volant.hypervisor import Hypervisor, HypervisorError, Machine, MachineSpec
from volant.model import EndKind, ProcessIdentity
from volant.model.agent import DAEMON_SHUTDOWN
from volant.templates import standby_tag_prefix, template_tag_prefix
from volant.vm import VmSettings, instance_of, memory_file, processes_of_vms, vm_directory

from ._directories import disk_dir, memory_dir, snapshot_dir, template_dir
from ._settings import Settings

_logger = logging.getLogger("volant.guests")

AT_ONCE = 8
GRACE_S = 25.0
"""For one guest, from being asked."""
TOTAL_S = 120.0
_ANSWER_S = 5.0
_QUIT_S = 10.0


async def stop_guests(
    settings: Settings,
    host: Host,
    hypervisor: Hypervisor,
    *,
    at_once: int = AT_ONCE,
    grace_s: float = GRACE_S,
    total_s: float = TOTAL_S,
) -> list[ProcessIdentity]:
    """Ask every guest of a state directory whose daemon has stopped; the processes that are left after `total_s`.

    A guest that does not shut down within `grace_s`, or can't be asked, loses its power. When so many don't that the
    time of the others comes near, all the others are asked at once.
    """
    instance = instance_of(settings.state_dir)
    prefix = f"volant-{instance}-"
    found = []
    of_vms = {each.identity: each.vm_id for each in await processes_of_vms(host, instance)}
    for identity in await host.processes.scan(prefix):
        if identity in of_vms:
            found.append(identity)
        elif identity.tag.startswith((template_tag_prefix(instance), standby_tag_prefix(instance))):
            # It was to become a template, or waited for a VM; nobody misses it.
            with suppress(ProcessGone), host.processes.open(identity) as process:
                process.kill()
    if not found:
        _logger.info("no guest runs")
        return []
    _logger.info("%d guests are asked to shut down, %d at a time", len(found), at_once)
    limit = trio.CapacityLimiter(at_once)

    async def stop(identity: ProcessIdentity) -> None:
        async with limit:
            try:
                await _stop(host, hypervisor, _spec(settings, identity, of_vms[identity]), grace_s, identity)
            except (HypervisorError, OSError) as error:
                _logger.error("%s: %s", identity.tag, error)

    async def hurry() -> None:
        await trio.sleep(total_s - grace_s - _QUIT_S)
        _logger.warning("time runs short: all that are left are asked at once")
        limit.total_tokens = math.inf

    with trio.move_on_after(total_s):
        async with trio.open_nursery() as hurrying:
            hurrying.start_soon(hurry)
            async with trio.open_nursery() as nursery:
                for identity in found:
                    nursery.start_soon(stop, identity)
            hurrying.cancel_scope.cancel()
    left = await host.processes.scan(prefix)
    for identity in left:
        _logger.error("%s: its process %d is left to systemd", identity.tag, identity.pid)
    return left


async def _stop(
    host: Host, hypervisor: Hypervisor, spec: MachineSpec, grace_s: float, identity: ProcessIdentity
) -> None:
    async with hypervisor.attach(spec, identity) as machine:
        with trio.move_on_after(grace_s):
            # One that is paused hears nothing.
            with suppress(HypervisorError):
                await machine.resume()
            if await _ask(host, spec, grace_s):
                end = await machine.ended()
                how = "has shut down" if end.kind is EndKind.SHUTDOWN else f"has ended: {end.message}"
                _logger.info("%s: the guest %s", identity.tag, how, extra={"vm_id": spec.vm_id})
                await _end(host, machine, spec)
                return
        _logger.warning("%s: the guest did not shut down within %g s; its power is cut", identity.tag, grace_s)
        await _end(host, machine, spec)


async def _end(host: Host, machine: Machine, spec: MachineSpec) -> None:
    await machine.quit(_QUIT_S)
    # It is lost anyway, and is memory of a host that may stay up.
    await host.files.remove_tree(spec.memory_file)


async def _ask(host: Host, spec: MachineSpec, grace_s: float) -> bool:
    """Whether the guest may have heard."""
    async with open_channel(host, VirtioSerial(spec.agent_path)) as channel:
        try:
            # The agent's patience with its workload ends before ours, so that the guest still writes its disks.
            answer = await AgentClient(channel).request_json(
                "POST", DAEMON_SHUTDOWN, {"grace_s": grace_s * 0.8}, timeout_s=_ANSWER_S
            )
        except (AgentUnreachable, AgentProtocolError) as error:
            _logger.warning("%s: the guest can't be asked: %s", spec.tag, error)
            return False
    return 200 <= answer.status < 300


def _spec(settings: Settings, identity: ProcessIdentity, vm_id: int) -> MachineSpec:
    """As much of a machine as it takes to attach to it: its directory and its tag."""
    places = VmSettings(
        runtime_dir=settings.runtime_dir,
        cache_dir=settings.cache_dir,
        memory_dir=memory_dir(settings),
        disk_dir=disk_dir(settings),
        template_dir=template_dir(settings),
        snapshot_dir=snapshot_dir(settings),
    )
    nowhere = places.cache_dir / "not-needed-to-attach"
    return MachineSpec(
        vm_id=vm_id,
        name=str(vm_id),
        cpu_cores=1,
        memory_mb=0,
        kernel=nowhere,
        initramfs=nowhere,
        cmdline="",
        directory=vm_directory(places, vm_id),
        memory_file=memory_file(places, vm_id),
        tag=identity.tag,
        accelerator="tcg",
    )
