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
    """Says which names new things of one kind may have on this host."""

    def claimed(self, keys: Sequence[Key], movable: Movable | None = None) -> AbstractAsyncContextManager[None]:
        """Holds names for what the block makes, and frees those of what is not there at its end.

        :param movable: how another host may start it if this one dies, None if none ever does
        :raises Problem: 409 another host has one; 503 that can't be found out.
        """

    async def free(self, key: Key) -> None:
        """Frees the name of something that is gone."""

    def elsewhere(self, project: str) -> Collection[str] | None:
        """Returns the names in a project that other hosts have, None if there are no other hosts."""


class OwnNames(Names):
    """The names of a host that is in no fleet: its journal gives them."""

    def claimed(self, keys: Sequence[Key], movable: Movable | None = None) -> AbstractAsyncContextManager[None]:
        del keys, movable
        return nullcontext()

    async def free(self, key: Key) -> None:
        pass

    def elsewhere(self, project: str) -> Collection[str] | None:
        del project
        return None


OWN_NAMES: Mapping[str, Names] = dict.fromkeys(("vms", "snapshots", "volumes"), OwnNames())
"""The names of a host that is in no fleet, by the collection in paths of the API."""


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
        """Finds it by name."""
        return Key(self.project, self.name)


def built_in(key: Key) -> Plugin | None:
    """Returns the plugin that every project has, if that is the key of it."""
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
    """Returns the project that always exists, if that is the key of it."""
    return Project(name=DEFAULT_PROJECT) if key.name == DEFAULT_PROJECT else None


Named = Plugin | Snapshot | Network | Volume | Project | Secret


class Kind(msgspec.Struct, frozen=True):
    """A kind of named object."""

    word: str
    """In the database."""
    type: type[Any]
    check: Callable[[Any], None]
    """:raises BadMember: volantd can't have stored it."""

    def decode(self, data: bytes) -> Any:
        """:raises msgspec.MsgspecError: it is none of this kind."""
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
