"""Named objects other than VMs: plugins, snapshots, networks, volumes, secrets and projects. All are
stored, staged and published alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime
from typing import Any, Protocol

import msgspec

from volant.model import (
    BASE,
    DEFAULT_PROJECT,
    Key,
    Manifest,
    Movable,
    Network,
    PluginView,
    Project,
    Secret,
    Snapshot,
    Volume,
    is_name,
)
from volant.model.stored import (
    BadMember,
    check_stored_egress,
    check_stored_network,
    check_stored_plugin,
    check_stored_secret,
    check_stored_snapshot,
    check_stored_time,
    check_stored_volume,
)


class Names(Protocol):
    """Decides which names new objects of one kind may have on this host."""

    def claimed(self, keys: Sequence[Key], movable: Movable | None = None) -> AbstractAsyncContextManager[None]:
        """Holds names for the objects that the block creates. At its end, names without an object are freed.

        :param movable: how another host may start the VM if this host is lost; None for objects that no other host
            starts
        :raises Problem: 409, another host has one of the names; 503, that can't be checked.
        """

    async def free(self, key: Key) -> None:
        """Frees the name of a removed object."""

    def elsewhere(self, project: str) -> Collection[str] | None:
        """Returns the names in a project that other hosts have, None if there are no other hosts."""


class OwnNames(Names):
    """The names of a host without a fleet: only its journal decides."""

    def claimed(self, keys: Sequence[Key], movable: Movable | None = None) -> AbstractAsyncContextManager[None]:
        del keys, movable
        return nullcontext()

    async def free(self, key: Key) -> None:
        pass

    def elsewhere(self, project: str) -> Collection[str] | None:
        del project
        return None


OWN_NAMES: Mapping[str, Names] = dict.fromkeys(("vms", "snapshots", "volumes"), OwnNames())
"""The names of a host without a fleet, by the collection in paths of the API."""


class Plugin(msgspec.Struct, frozen=True):
    """An installed plugin. `base` is built in, belongs to every project and has no `created_at`."""

    manifest: Manifest
    enabled: bool = True
    created_at: datetime | None = None
    project: str = DEFAULT_PROJECT

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def key(self) -> Key:
        """The key by which it is found."""
        return Key(self.project, self.name)


def built_in(key: Key) -> Plugin | None:
    """Returns the built-in plugin of every project if this is its key."""
    return Plugin(BASE, project=key.project) if key.name == BASE.name else None


def plugin_view(plugin: Plugin) -> PluginView:
    """Returns what clients see of `plugin`."""
    manifest = plugin.manifest
    return PluginView(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        runtime=manifest.runtime,
        enabled=plugin.enabled,
        builtin=plugin.created_at is None,
        created_at=plugin.created_at,
        labels=manifest.labels,
        project=plugin.project,
    )


def default_project(key: Key) -> Project | None:
    """Returns the project that always exists if this is its key."""
    return Project(name=DEFAULT_PROJECT) if key.name == DEFAULT_PROJECT else None


Named = Plugin | Snapshot | Network | Volume | Project | Secret


class Kind(msgspec.Struct, frozen=True):
    """A kind of named object."""

    word: str
    """The name of the kind in the database."""
    type: type[Any]
    check: Callable[[Any], None]
    """Checks an object. :raises BadMember: volantd can't have stored it."""

    def decode(self, data: bytes) -> Any:
        """Returns the object in some JSON. :raises msgspec.MsgspecError: it is not of this kind."""
        return msgspec.json.decode(data, type=self.type)


def _check_plugin(plugin: Plugin) -> None:
    if not is_name(plugin.project):
        raise BadMember("project", plugin.project, "which is no name")
    check_stored_plugin(plugin.manifest)
    check_stored_time("created_at", plugin.created_at)


def _check_project(project: Project) -> None:
    if not is_name(project.name):
        raise BadMember("name", project.name, "which is no name")
    check_stored_egress(project.egress)
    check_stored_time("created_at", project.created_at)


KINDS = {
    kind.type: kind
    for kind in (
        Kind("plugin", Plugin, _check_plugin),
        Kind("snapshot", Snapshot, check_stored_snapshot),
        Kind("network", Network, check_stored_network),
        Kind("volume", Volume, check_stored_volume),
        Kind("project", Project, _check_project),
        Kind("secret", Secret, check_stored_secret),
    )
}
KINDS_BY_WORD = {kind.word: kind for kind in KINDS.values()}
