"""Finds processes, logs and disks of VMs on the host, with rows in the database or without."""

from __future__ import annotations

import logging
from contextlib import suppress

from volant.host import Host, ProcessGone
from volant.journal import Evidence, Running, Store
from volant.logs import VmLogs
from volant.model import ProcessIdentity
from volant.vm import Vms, instance_of, processes_of_vms

from ._directories import disk_dir
from ._settings import Settings

_logger = logging.getLogger("volant.daemon")


async def evidence_of(host: Host, settings: Settings, logs: VmLogs) -> Evidence:
    """Returns the running VMs and the highest VM id with traces on the host. Raises OSError."""
    await logs.prepare()
    instance = instance_of(settings.state_dir)
    running = {}
    for each in await processes_of_vms(host, instance):
        console = settings.runtime_dir / "vms" / str(each.vm_id) / "console.sock"
        running[each.vm_id] = Running(each.boot, each.identity, str(console))
    disks = await host.threads.run(host.files.names, disk_dir(settings))
    ids = [int(name.partition("-")[0]) for name in disks if name.partition("-")[0].isdecimal()]
    return Evidence(max([0, *running, *logs.ids(), *ids]), running)


class Leftovers:
    """Processes and disks that belong to no VM. The daemon reports them and never removes them by itself, as the
    database may have been restored from a backup."""

    def __init__(self, host: Host, settings: Settings, store: Store) -> None:
        self._host = host
        self._directory = disk_dir(settings)
        self._store = store
        self._processes: list[ProcessIdentity] = []
        self._disks: list[str] = []

    async def find(self, vms: Vms) -> None:
        """Finds and logs leftovers."""
        self._processes = [orphan.identity for orphan in await vms.orphans.list()]
        for identity in self._processes:
            _logger.warning(
                "process %d is a hypervisor without a VM; run `volar vms adopt %s` to make it one, or `volar vms kill` "
                "to end it",
                identity.pid,
                identity.tag,
            )
        layers = {row.layer for row in self._store.projection.rows()}
        for name in await self._host.threads.run(self._host.files.names, self._directory):
            if name not in layers:
                _logger.warning("%s is the disk of a VM that does not exist", self._directory / name)
                self._disks.append(name)

    def view(self) -> list[dict[str, object]]:
        """Returns leftovers that still exist and belong to no VM, ready for JSON."""
        rows = self._store.projection.rows()
        tags, layers = {row.tag for row in rows}, {row.layer for row in rows}
        found: list[dict[str, object]] = []
        for identity in self._processes:
            with suppress(ProcessGone), self._host.processes.open(identity) as process:
                if identity.tag not in tags and not process.exited:
                    found.append({"pid": identity.pid, "tag": identity.tag})
        found += [{"disk": str(self._directory / name)} for name in self._disks if name not in layers]
        return found
