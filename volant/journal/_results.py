"""Results of operations, as they are stored for an idempotency key and rendered by the API.

A result holds the view that the client gets, so its members are as stable as the API's: a member that is added needs a
default, or results that an earlier version stored can't be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Self

import msgspec

from volant.model import (
    Network,
    NetworkView,
    PluginView,
    Problem,
    Project,
    ProjectView,
    Snapshot,
    SnapshotView,
    Used,
    VmRow,
    VmView,
    Volume,
    VolumeView,
    network_view,
    snapshot_view,
    volume_view,
)

from ._named import Plugin, plugin_view


class _OfVm(msgspec.Struct, frozen=True):
    vm: VmView
    revision: int

    @classmethod
    def of(cls, row: VmRow) -> Self:
        return cls(row.view, row.revision)


class VmCreated(_OfVm, frozen=True, tag="vm-created"):
    pass


class VmChanged(_OfVm, frozen=True, tag="vm-changed"):
    """A VM after a command, also after one that changed nothing."""


class VmForked(msgspec.Struct, frozen=True, tag="vm-forked"):
    copies: tuple[VmView, ...]

    @classmethod
    def of(cls, rows: Iterable[VmRow]) -> Self:
        return cls(tuple(row.view for row in rows))


class SnapshotTaken(msgspec.Struct, frozen=True, tag="snapshot-taken"):
    snapshot: SnapshotView

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        return cls(snapshot_view(snapshot))


class NetworkCreated(msgspec.Struct, frozen=True, tag="network-created"):
    network: NetworkView

    @classmethod
    def of(cls, network: Network) -> Self:
        return cls(network_view(network))


class ProjectCreated(msgspec.Struct, frozen=True, tag="project-created"):
    project: ProjectView

    @classmethod
    def of(cls, project: Project) -> Self:
        nothing = Used(vms=0, cpu_cores=0, memory_mb=0, disk_mb=0, snapshots=0)
        return cls(
            ProjectView(
                name=project.name,
                quota=project.quota,
                egress=project.egress,
                used=nothing,
                created_at=project.created_at,
            )
        )


class _OfVolume(msgspec.Struct, frozen=True):
    volume: VolumeView

    @classmethod
    def of(cls, volume: Volume) -> Self:
        # Measured and derived values are no part of a stored result.
        return cls(volume_view(volume, used_bytes=None))


class VolumeCreated(_OfVolume, frozen=True, tag="volume-created"):
    pass


class VolumeChanged(_OfVolume, frozen=True, tag="volume-changed"):
    """A volume after it was resized."""


class _OfPlugin(msgspec.Struct, frozen=True):
    plugin: PluginView

    @classmethod
    def of(cls, plugin: Plugin) -> Self:
        return cls(plugin_view(plugin))


class PluginInstalled(_OfPlugin, frozen=True, tag="plugin-installed"):
    pass


class PluginChanged(_OfPlugin, frozen=True, tag="plugin-changed"):
    pass


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """The `Problem` that a request was refused with. A failure of the daemon (5xx) is not stored."""

    status: Annotated[int, msgspec.Meta(ge=400, le=499)]
    code: str
    detail: str
    field: str | None
    hint: str | None
    vm: str | None

    @classmethod
    def of(cls, problem: Problem) -> Self:
        return cls(problem.status, problem.code, problem.detail, problem.field, problem.hint, problem.vm)

    def problem(self) -> Problem:
        return Problem(self.status, self.code, self.detail, field=self.field, hint=self.hint, vm=self.vm)


Result = (
    VmCreated
    | VmChanged
    | VmForked
    | SnapshotTaken
    | NetworkCreated
    | ProjectCreated
    | VolumeCreated
    | VolumeChanged
    | PluginInstalled
    | PluginChanged
    | Refusal
)  # fmt: skip
