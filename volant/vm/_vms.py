"""Assembles the parts for the VMs of one daemon, and their volumes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import msgspec

from actors import DynamicSupervisor, Ref
from volant.channel import AgentProtocolError, AgentUnreachable
from volant.directories import Virtiofsd
from volant.host import Host
from volant.hypervisor import Hypervisor, HypervisorError
from volant.images import ArtifactCache
from volant.journal import OWN_NAMES, Journal, Names, Projection, Store
from volant.logs import VmLogs
from volant.model import Problem, Volume, writer_of
from volant.network import NetworkKeeper, Passt
from volant.oci import ImageSource
from volant.secrets import Secrets
from volant.templates import Templates, TemplateStore, WarmPool
from volant.volumes import VolumeFiles, Volumes

from ._actor import VmActor
from ._actors import VmActors
from ._boot_files import BootFiles
from ._boot_limiter import BootSlots
from ._capacity import Capacity
from ._checkpoint_store import CheckpointStore
from ._copies import Copies
from ._deps import VmDeps
from ._fence import NoFence, VmFence
from ._guest_access import GuestAccess
from ._layout import VmSettings
from ._lifecycle import Lifecycle
from ._machine_spec import serial_of
from ._network import VmNetworks
from ._orphans import Orphans
from ._preparation import BootPreparation
from ._process import VmProcess
from ._storage import Storage
from ._templates import VmTemplates


class GuestVolumes(msgspec.Struct, frozen=True):
    """Changes volumes in the guests that have them."""

    projection: Projection
    processes: Mapping[int, VmProcess]

    async def grow(self, volume: Volume) -> None:
        """Notifies the guest that writes to a volume of its new size. :raises Problem: 503, it can't use it."""
        row = writer_of(volume.id, self.projection.rows())
        process = None if row is None else self.processes.get(row.id)
        if row is None or process is None or not row.agent_seen:
            # One that is booting looks at the size when it mounts.
            return
        serial, size = serial_of(volume.id), volume.size_mb * 2**20
        try:
            machine = await process.machine()
            await machine.grow_volume(serial, size)
            if process.paused:
                raise AgentUnreachable("its guest is paused")
            await process.agent.mount_volumes({serial: size})
        except (AgentProtocolError, AgentUnreachable, HypervisorError) as error:
            raise Problem(
                503, "volume-not-grown",
                f"volume {volume.name!r} has its new size, and the filesystem in VM {row.name!r} has not yet: {error}",
                vm=row.name, hint="resize it again, to the same size; or restart the VM",
            ) from error  # fmt: skip


class Vms(Lifecycle):
    """The VMs of one daemon: their lifecycle, and by name all other requests about them."""

    def __init__(
        self,
        *,
        host: Host,
        hypervisor: Hypervisor,
        journal: Ref[Journal],
        store: Store,
        logs: VmLogs,
        artifacts: ArtifactCache,
        oci: ImageSource,
        templates: TemplateStore,
        builder: Ref[Templates],
        warm_pool: WarmPool,
        slots: BootSlots,
        passt: Passt,
        virtiofsd: Virtiofsd,
        secrets: Secrets,
        network: Ref[NetworkKeeper] | None,
        supervisor: DynamicSupervisor,
        settings: VmSettings,
        instance: str,
        names: Mapping[str, Names] = OWN_NAMES,
        fence: VmFence | None = None,
    ) -> None:
        """Creates them.

        :param builder: the actor that builds templates
        :param network: the actor that manages taps; None if no VM gets one
        :param supervisor: the supervisor of VMs' actors
        :param names: the names of VMs, snapshots and volumes, by the collection in paths of the API
        :param fence: the fence of VMs that other hosts may start; None if there are no other hosts
        """
        fence = fence or NoFence()
        self.artifacts = artifacts
        self.oci = oci
        self.secrets = secrets
        self.warm_pool = warm_pool
        self.settings = settings
        self.slots = slots
        files = BootFiles(host, store, artifacts, oci, secrets, settings)
        checkpoints = CheckpointStore(
            host, hypervisor, memory_dir=settings.memory_dir, snapshot_dir=settings.snapshot_dir
        )
        networks = VmNetworks(store, hypervisor, passt, network)
        self.templates = VmTemplates(host, hypervisor, store, journal, templates, builder, files, settings)
        deps = VmDeps(
            host=host,
            hypervisor=hypervisor,
            journal=journal,
            store=store,
            logs=logs,
            settings=settings,
            instance=instance,
            preparation=BootPreparation(
                host, hypervisor, files, self.templates, warm_pool, checkpoints, secrets, settings
            ),
            templates=self.templates,
            warm_pool=warm_pool,
            checkpoints=checkpoints,
            networks=networks,
            virtiofsd=virtiofsd,
            secrets=secrets,
            slots=slots,
            fence=fence,
        )
        capacity = Capacity(host, store.projection, templates, warm_pool, settings)
        self.actors = VmActors(supervisor, journal, store.projection, partial(VmActor, deps=deps), settings)
        super().__init__(store, journal, self.actors, capacity, virtiofsd, names["vms"], deps.workload_changed, fence)
        self.guests = GuestAccess(host, store.projection, deps.processes, self.actors)
        self.orphans = Orphans(
            host, hypervisor, store, journal, logs, self.actors, networks, virtiofsd, names["vms"], settings, instance
        )
        guests = GuestVolumes(store.projection, deps.processes)
        self.volumes = Volumes(
            host, store, journal, VolumeFiles(host, settings.volume_dir), names["volumes"], guests.grow
        )
        self.copies = Copies(
            host,
            store,
            journal,
            checkpoints,
            self.actors,
            capacity,
            self.volumes,
            names["vms"],
            names["snapshots"],
            settings,
        )
        self.storage = Storage(host, store, logs, artifacts, templates, settings, instance)
