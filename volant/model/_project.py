"""Projects: namespaces. Every object is identified by its project and its name (docs/explanation/identity.md)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, NamedTuple

import msgspec

from ._egress import EGRESS_ALL, Egress, EgressRequest
from ._problem import Problem
from ._text import Name, Time

DEFAULT_PROJECT = "default"
"""The project that always exists. It also holds objects from before there were projects."""

Limit = Annotated[int, msgspec.Meta(ge=0, le=10**9)]


class Key(NamedTuple):
    """Identifies a named object by project and name: a VM, a network, a volume, a snapshot, a plugin."""

    project: str
    name: str


class Quota(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The limits of a project; null for no limit."""

    vms: Limit | None = None
    """Maximum number of VMs. Stopped VMs count, here and for the other limits."""
    cpu_cores: Limit | None = None
    """Maximum CPU cores of all VMs together."""
    memory_mb: Limit | None = None
    """Maximum memory of all VMs together."""
    disk_mb: Limit | None = None
    """Maximum size of all VM disks and volumes together. The maximum size of each counts, not what it occupies."""
    snapshots: Limit | None = None
    """Maximum number of snapshots."""
    creates_per_minute: Limit | None = None
    """Maximum number of VMs created, forked or restored per minute."""


class CreateProject(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/projects`."""

    name: Name
    quota: Quota = Quota()
    egress: EgressRequest = EGRESS_ALL
    """The destinations that its VMs may connect to."""


class SetEgress(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `PUT /api/v1/projects/{name}/egress`."""

    egress: EgressRequest


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """The stored state of a project."""

    name: str
    quota: Quota = Quota()
    egress: Egress = EGRESS_ALL
    """The policy of VMs whose requests have none. Policies in requests must be within it."""
    created_at: datetime | None = None
    """None for `default`, which always exists."""

    @property
    def project(self) -> str:
        """The project's own name, so that filters by project apply to it too."""
        return self.name

    @property
    def key(self) -> Key:
        """Its project and name."""
        return Key(self.name, self.name)


class Used(msgspec.Struct, frozen=True, kw_only=True):
    """The amounts that a project uses, for comparison with its `Quota`."""

    vms: int
    cpu_cores: int
    memory_mb: int
    disk_mb: int
    snapshots: int

    def __add__(self, other: Used) -> Used:
        """Returns the sum of both."""
        return Used(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


NOTHING_USED = Used(vms=0, cpu_cores=0, memory_mb=0, disk_mb=0, snapshots=0)


class ProjectView(msgspec.Struct, frozen=True, kw_only=True):
    """A project as the API shows it."""

    name: str
    quota: Quota
    egress: Egress
    used: Used
    created_at: Time | None
    """Null for the project that always exists."""


def no_such_project(name: str) -> Problem:
    """Returns the 404 for the name of a project, for callers who may see all of them."""
    return Problem(
        404, "project-not-found", f"there is no project named {name[:80]!r}", field="project",
        hint="`volar projects list` shows what there is",
    )  # fmt: skip
