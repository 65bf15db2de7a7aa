"""The results of operations, and their views with headers and links."""

from __future__ import annotations

from collections.abc import Sequence
from types import GenericAlias
from typing import Any, Generic, TypeVar, get_args, get_origin
from urllib.parse import quote

import msgspec

from volant.journal import (
    NetworkCreated,
    PluginChanged,
    PluginInstalled,
    ProjectCreated,
    SnapshotTaken,
    VmChanged,
    VmCreated,
    VmForked,
    VolumeChanged,
    VolumeCreated,
)
from volant.model import NetworkView, PluginView, ProjectView, SnapshotView, VmView, VolumeView

T = TypeVar("T")


class Page(Generic[T], msgspec.Struct, frozen=True):
    """A part of a list."""

    items: Sequence[T]
    total: int | None
    """The number of items on all pages; None if not all hosts of the fleet were asked."""
    next_cursor: int | None
    """None on the last page."""
    event_id: str
    """The last event that the list includes."""
    cursors: Sequence[int]
    """The cursor after each item."""


class Shown(msgspec.Struct, frozen=True):
    """The view of a result, with its headers."""

    view: Any
    etag: str | None = None
    location: str | None = None


def etag(vm_id: int, revision: int) -> str:
    """Returns the `ETag` of a VM, which changes with every change of it."""
    return f'"{vm_id}-{revision}"'


def show(result: Any) -> Shown:
    """Returns the view of a result."""
    match result:
        case VmCreated(vm=vm, revision=revision):
            return Shown(vm, etag(vm.id, revision), f"/api/v1/vms/{quote(vm.name)}")
        case VmChanged(vm=vm, revision=revision):
            return Shown(vm, etag(vm.id, revision))
        case VmForked(copies=copies):
            return Shown(copies)
        case SnapshotTaken(snapshot=snapshot):
            return Shown(snapshot, location=f"/api/v1/snapshots/{quote(snapshot.name)}")
        case NetworkCreated(network=network):
            return Shown(network, location=f"/api/v1/networks/{quote(network.name)}")
        case ProjectCreated(project=project):
            return Shown(project, location=f"/api/v1/projects/{quote(project.name)}")
        case VolumeCreated(volume=volume):
            return Shown(volume, location=f"/api/v1/volumes/{quote(volume.name)}")
        case VolumeChanged(volume=volume):
            return Shown(volume)
        case PluginInstalled(plugin=plugin):
            return Shown(plugin, location=f"/api/v1/plugins/{quote(plugin.name)}")
        case PluginChanged(plugin=plugin):
            return Shown(plugin)
        case Page(items=items):
            return Shown(items)
    return Shown(result)


_VIEWS: dict[Any, Any] = {
    VmCreated: VmView,
    VmChanged: VmView,
    VmForked: list[VmView],
    SnapshotTaken: SnapshotView,
    NetworkCreated: NetworkView,
    ProjectCreated: ProjectView,
    VolumeCreated: VolumeView,
    VolumeChanged: VolumeView,
    PluginInstalled: PluginView,
    PluginChanged: PluginView,
}


def view_type(result: Any) -> Any:
    """Returns the type of the view for a type of results; None if it has no view."""
    if get_origin(result) is Page:
        return GenericAlias(list, get_args(result))
    return None if result is type(None) else _VIEWS.get(result, result)


def has_etag(result: Any) -> bool:
    """Returns whether results of a type have an `ETag`."""
    return result in (VmCreated, VmChanged)


def has_location(result: Any) -> bool:
    """Returns whether results of a type are new objects with a path."""
    return result in (VmCreated, SnapshotTaken, NetworkCreated, ProjectCreated, VolumeCreated, PluginInstalled)
