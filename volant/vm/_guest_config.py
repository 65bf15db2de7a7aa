"""From a VM's row to what its guest's agent is configured with."""

from __future__ import annotations

import hashlib

import msgspec

from volant.model import VmRow


def guest_manifest(row: VmRow) -> dict[str, object]:
    """Returns the body of `PUT /v1/daemon/manifest`. It lacks `boot`: the host's paths are no business of a guest's."""
    manifest: dict[str, object] = msgspec.to_builtins(msgspec.structs.replace(row.manifest, boot=None))
    return manifest


def workload_spec(row: VmRow) -> dict[str, object] | None:
    """Returns the body of `PUT /v1/daemon/workload`: the manifest's workload with the VM's own environment over it."""
    workload = row.manifest.workload
    if workload is None:
        return None
    spec: dict[str, object] = msgspec.to_builtins(workload)
    spec["env"] = {**workload.env, **row.env}
    return spec


def machine_id(instance: str, row: VmRow) -> str:
    """Returns a clone's machine id: unlike that of any other VM, and the same in each boot."""
    return hashlib.sha256(f"{instance} {row.id} {row.created_at.isoformat()}".encode()).hexdigest()[:32]
