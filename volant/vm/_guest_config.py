"""From a VM's row to what its guest's agent is configured with."""

from __future__ import annotations

import hashlib

import msgspec

from volant.model import VmRow


def guest_manifest(row: VmRow) -> dict[str, object]:
    """Returns the body of `PUT /v1/daemon/manifest`: the manifest, with the VM's own environment over that of `exec`.

    It lacks `boot`: the host's paths are no business of a guest's.
    """
    defaults = row.manifest.exec
    if defaults is not None:
        defaults = msgspec.structs.replace(defaults, env={**defaults.env, **row.env})
    manifest: dict[str, object] = msgspec.to_builtins(msgspec.structs.replace(row.manifest, boot=None, exec=defaults))
    return manifest


def workload_spec(row: VmRow) -> dict[str, object] | None:
    """Returns the body of `PUT /v1/daemon/workload`: the manifest's workload with the VM's own environment over it,
    without secrets."""
    workload = row.manifest.workload
    if workload is None or not row.start_workload:
        return None
    # Members with their default values are left out, so agents that do not know them take the rest. What happens to the
    # VM at the end of the workload is the daemon's to do.
    spec: dict[str, object] = msgspec.to_builtins(msgspec.structs.replace(workload, on_exit="keep"))
    spec["env"] = {**workload.env, **row.env}
    if row.waits_for_client:
        spec["attach"] = True
    return spec


def machine_id(instance: str, row: VmRow) -> str:
    """Returns a clone's machine id: unlike that of any other VM, and the same in each boot."""
    return hashlib.sha256(f"{instance} {row.id} {row.created_at.isoformat()}".encode()).hexdigest()[:32]
