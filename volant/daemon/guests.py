"""`python -m volant.daemon.guests`: shuts down guests when the host shuts down.

The unit `volant-guests.service` runs this program when it is stopped: after the daemon has stopped and before systemd
kills the VMs' scopes. So it also works after the daemon crashed or was stopped, and it never runs when the daemon
only restarts.

**It does not change the database.** As after a power cut, the rows still have the desired states of VMs, and their
processes belong to another boot. Rejected: stopping VMs like a client, as the daemon could then not tell which VMs to
start again. It does not even open the database, so that a damaged database does not kill guests: process tags contain
the VM's id.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from contextlib import suppress

import trio

from volant.channel import AgentClient, AgentProtocolError, AgentUnreachable, VirtioSerial, open_channel
from volant.host import Host, ProcessGone, watchdog_tag
from volant.hypervisor import Hypervisor, HypervisorError, Machine, MachineSpec
from volant.hypervisor.qemu import QemuHypervisor
from volant.model import EndKind, ProcessIdentity
from volant.model.agent import DAEMON_SHUTDOWN
from volant.templates import standby_tag_prefix, template_tag_prefix
from volant.vm import instance_of, memory_file, processes_of_vms, vm_directory

from ._command_line import load
from ._directories import DirectoryError, claimed, confine, vm_directories
from ._journald import JournalHandler, is_journal
from ._settings import Settings, SettingsError, parse_uids

_logger = logging.getLogger("volant.guests")

AT_ONCE = 8
GRACE_S = 25.0
"""Seconds that one guest may take to shut down."""
TOTAL_S = 120.0
_ANSWER_S = 15.0
"""Maximum time for the answer of the guest's agent, which takes seconds on a busy host."""
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
    """Shuts down all guests of a state directory. Returns the processes that are left after `total_s`.

    A guest that can't be asked, or does not shut down within `grace_s`, is killed. When the time runs short, all
    remaining guests are asked at once.
    """
    instance = instance_of(settings.state_dir)
    prefix = f"volant-{instance}-"
    found = []
    of_vms = {each.identity: each.vm_id for each in await processes_of_vms(host, instance)}
    for identity in await host.processes.scan(prefix):
        if identity in of_vms:
            found.append(identity)
        elif identity.tag.startswith((template_tag_prefix(instance), standby_tag_prefix(instance))):
            # The process of a template's build or of the warm pool has no VM.
            with suppress(ProcessGone), host.processes.open(identity) as process:
                process.kill()
    if not found:
        _logger.info("no guest is running")
        return []
    _logger.info("shutting down %d guests, %d at a time", len(found), at_once)
    limit = trio.CapacityLimiter(at_once)

    async def stop(identity: ProcessIdentity) -> None:
        async with limit:
            try:
                await _stop(host, hypervisor, _spec(settings, identity, of_vms[identity]), grace_s, identity)
            except (HypervisorError, OSError) as error:
                _logger.error("%s: %s", identity.tag, error)

    async def hurry() -> None:
        await trio.sleep(total_s - grace_s - _QUIT_S)
        _logger.warning("time runs short: shutting down all remaining guests at once")
        limit.total_tokens = math.inf

    with trio.move_on_after(total_s):
        async with trio.open_nursery() as hurrying:
            hurrying.start_soon(hurry)
            async with trio.open_nursery() as nursery:
                for identity in found:
                    nursery.start_soon(stop, identity)
            hurrying.cancel_scope.cancel()
    # The watchdog of a fleet is no guest's.
    left = [identity for identity in await host.processes.scan(prefix) if identity.tag != watchdog_tag(instance)]
    for identity in left:
        _logger.error("%s: process %d did not end; systemd will kill it", identity.tag, identity.pid)
    return left


async def _stop(
    host: Host, hypervisor: Hypervisor, spec: MachineSpec, grace_s: float, identity: ProcessIdentity
) -> None:
    if host.limits.is_frozen(identity):
        # Another host may run it by now.
        _logger.warning("%s: the guest is frozen, as its host has lost touch with the fleet, and is killed", spec.tag)
        with trio.move_on_after(_QUIT_S):
            await host.processes.end([identity])
            await host.files.remove_tree(spec.memory_file)
        return
    async with hypervisor.attach(spec, identity) as machine:
        with trio.move_on_after(grace_s):
            # A paused guest can't shut down.
            with suppress(HypervisorError):
                await machine.resume()
            if await _ask(host, spec, grace_s):
                end = await machine.ended()
                how = "shut down" if end.kind is EndKind.SHUTDOWN else f"ended: {end.message}"
                _logger.info("%s: the guest %s", identity.tag, how, extra={"vm_id": spec.vm_id})
                await _end(host, machine, spec)
                return
        _logger.warning("%s: the guest did not shut down within %g s and is killed", identity.tag, grace_s)
        await _end(host, machine, spec)


async def _end(host: Host, machine: Machine, spec: MachineSpec) -> None:
    await machine.quit(_QUIT_S)
    # The guest's memory is useless now, and the host may keep running.
    await host.files.remove_tree(spec.memory_file)


async def _ask(host: Host, spec: MachineSpec, grace_s: float) -> bool:
    """Asks the guest to shut down. Returns whether it may have received the request."""
    async with open_channel(host, VirtioSerial(spec.agent_path)) as channel:
        try:
            # The agent gives its workload less time, so that the guest can still flush its disks.
            answer = await AgentClient(channel).request_json(
                "POST", DAEMON_SHUTDOWN, {"grace_s": grace_s * 0.8}, timeout_s=_ANSWER_S
            )
        except (AgentUnreachable, AgentProtocolError) as error:
            _logger.warning("%s: the guest can't be asked: %s", spec.tag, error)
            return False
    return 200 <= answer.status < 300


def _spec(settings: Settings, identity: ProcessIdentity, vm_id: int) -> MachineSpec:
    """Returns a spec that is sufficient for attaching: with the machine's directory and tag."""
    places = vm_directories(settings)
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


def main() -> None:
    """Runs the program. Exits with 0 if no guest is left, 1 if one is left or the daemon runs, 2 for invalid
    settings."""
    handlers = [JournalHandler("volant-guests")] if is_journal(sys.stderr.fileno(), os.environ) else None
    logging.basicConfig(level="INFO", format="%(levelname)-7s %(message)s", handlers=handlers)
    try:
        settings, _ = load(sys.argv[1:], os.environ)
        with claimed(settings):
            host = Host(users=parse_uids(settings.vm_uids))
            confine(host, settings)
            left = trio.run(stop_guests, settings, host, QemuHypervisor(host, settings.cache_dir))
    except SettingsError as error:
        logging.error("%s", error)
        sys.exit(2)
    except DirectoryError as error:
        logging.error("%s; `volar system drain --stop-vms` stops guests while the daemon runs", error)
        sys.exit(1)
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
