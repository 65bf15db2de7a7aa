"""`volar projects`."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from volant.client import ProjectsOperations
from volant.model import EGRESS_ALL, Egress, ProjectView, Quota, SetEgress, egress_text

from ._complete import project_names
from ._derived import Shown, add_commands, member_options
from ._lazy_group import LazyGroup
from ._options import egress_option
from ._run import Session, command
from ._shown import Sheet, show_one, text_of


@click.group(name="projects", cls=LazyGroup)
def group() -> None:
    """Manage projects: namespaces with limits.

    VMs, networks, volumes, snapshots and plugins belong to a project, and a key sees one. Administrators choose
    with --project; without it, it is `default`.
    """


@command(group, "limit")
@click.argument("project", shell_complete=project_names)
@click.option("--none", "none", is_flag=True, help="Remove all limits first; --egress stays.")
@member_options(Quota)
@egress_option("its new VMs")
async def limit(session: Session, /, project: str, none: bool, egress: Egress | None, **limits: int | None) -> None:
    """Change limits of a project; others stay. Objects that exceed a new limit stay too."""
    projects = session.client.projects
    shown = await projects.get(project)
    quota = msgspec.structs.replace(
        Quota() if none else shown.quota, **{name: value for name, value in limits.items() if value is not None}
    )
    if quota != shown.quota:
        shown = await projects.set_quota(project, quota)
    if egress is not None:
        shown = await projects.set_egress(project, SetEgress(egress=egress))
    show_one(session.out, shown, _SHEET)


def _limit(name: str) -> Any:
    """Returns the function that shows how much of a limit a project uses."""

    def text(project: ProjectView) -> str:
        most, used = getattr(project.quota, name), getattr(project.used, name, None)
        limit = "no limit" if most is None else str(text_of(name, most))
        return limit if used is None else f"{text_of(name, used)} of {limit}"

    return text


_LIMITS = [field.name for field in msgspec.structs.fields(Quota)]
_SHEET = Sheet(
    ("name", "vms", "cpu_cores", "memory_mb", "disk_mb", "snapshots"),
    fields=("name", *_LIMITS, "egress", "created_at"),
    cells={"egress": lambda project: egress_text(project.egress), **{name: _limit(name) for name in _LIMITS}},
)
add_commands(
    group,
    "projects",
    ProjectsOperations,
    Shown({ProjectView: _SHEET}),
    besides=("set_quota", "set_egress"),
    options={"create": {"egress": egress_option("its VMs", default=EGRESS_ALL)}},
)
