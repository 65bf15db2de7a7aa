"""The limits of projects: their usage, and whether a change fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from volant.model import (
    NONE,
    Key,
    Problem,
    Project,
    Snapshot,
    Used,
    VmRow,
    Volume,
    covers,
    egress_text,
    no_such_project,
)

from ._stage import Stage

_NOUNS = {"vms": "VMs", "cpu_cores": "CPU cores", "memory_mb": "MiB of memory", "disk_mb": "MiB of disk",
          "snapshots": "snapshots"}  # fmt: skip


def used_by(project: str, rows: Iterable[VmRow], volumes: Iterable[Volume], snapshots: Iterable[Snapshot]) -> Used:
    """Returns the usage of a project. A disk counts with its maximum size."""
    own = [row for row in rows if row.project == project]
    return Used(
        vms=len(own),
        cpu_cores=sum(row.cpu_cores for row in own),
        memory_mb=sum(row.memory_mb for row in own),
        disk_mb=sum(row.disk_mb or 0 for row in own)
        + sum(volume.size_mb for volume in volumes if volume.project == project),
        snapshots=sum(one.project == project and not one.move for one in snapshots),
    )


def require_project(stage: Stage, name: str) -> Project:
    """Returns a project. :raises Problem: 404."""
    project = stage.project(Key(name, name))
    if project is None:
        raise no_such_project(name)
    return project


def check_vms_fit(stage: Stage, rows: Sequence[VmRow]) -> None:
    """Checks new VMs of one project.

    :raises Problem: 404 the project is gone; 409 `quota-exceeded`, `egress-not-allowed`; 422 a disk of unknown size;
        429 too many creates.
    """
    project = require_project(stage, rows[0].project)
    quota = project.quota
    for row in rows:
        if row.network != NONE and not covers(project.egress, row.egress):
            raise Problem(
                409, "egress-not-allowed",
                f"VM {row.name!r} would have egress {egress_text(row.egress)}, and project {project.name!r} allows "
                f"{egress_text(project.egress)}",
                field="egress", vm=row.name, hint="ask for less, or have an administrator change the project",
            )  # fmt: skip
    if quota.disk_mb is not None:
        for row in rows:
            if row.layer and row.disk_mb is None:
                raise Problem(
                    422, "contradictory-request",
                    f"project {project.name!r} has a limit for disks, and that of VM {row.name!r} has no size",
                    field="disk_mb", vm=row.name, hint="give `disk_mb`",
                )  # fmt: skip
    _check(
        stage, project, vms=len(rows), cpu_cores=sum(row.cpu_cores for row in rows),
        memory_mb=sum(row.memory_mb for row in rows), disk_mb=sum(row.disk_mb or 0 for row in rows),
    )  # fmt: skip
    if quota.creates_per_minute is None:
        return
    recent = stage.recent_creates(project.name)
    if recent + len(rows) > quota.creates_per_minute:
        raise Problem(
            429, "too-many-creates",
            f"project {project.name!r} may create {quota.creates_per_minute} VMs within a minute, and has created "
            f"{recent}",
            hint="try again later", retry_after_s=10,
        )  # fmt: skip


def check_fits(stage: Stage, project: str, *, disk_mb: int = 0, snapshots: int = 0) -> None:
    """Checks that a change fits the limits of a project. :raises Problem: 404, the project is gone; 409,
    `quota-exceeded`."""
    _check(stage, require_project(stage, project), disk_mb=disk_mb, snapshots=snapshots)


def _check(stage: Stage, project: Project, **more: int) -> None:
    if all(getattr(project.quota, name) is None for name in _NOUNS):
        return
    used = used_by(project.name, stage.all_rows(), stage.volumes.values(), stage.snapshots.values())
    used += stage.used_elsewhere(project.name)
    for name, added in more.items():
        limit = getattr(project.quota, name)
        has = getattr(used, name)
        if limit is not None and added and has + added > limit:
            raise Problem(
                409, "quota-exceeded",
                f"project {project.name!r} has {has} of its {limit} {_NOUNS[name]}, and {added} more do not fit",
                field="project", hint="delete something, or have an administrator raise the limit",
            )  # fmt: skip
