"""`volar projects`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from volant.client import ProjectsOperations
from volant.model import EGRESS_ALL, CreateProject, Egress, ProjectView, Quota, SetEgress, egress_text

from ._complete import project_names
from ._derived import add_commands
from ._lazy_group import LazyGroup
from ._options import Size, egress_option, listing
from ._output import Output
from ._run import Session, command
from ._text import safe

F = TypeVar("F", bound=Callable[..., Any])

_LIMITS = (
    ("vms", "VMs", int, "N"),
    ("cpu_cores", "CPU cores of all VMs together", int, "N"),
    ("memory_mb", "memory of all VMs together", Size(), "SIZE"),
    ("disk_mb", "disks of VMs and volumes together", Size(), "SIZE"),
    ("snapshots", "snapshots", int, "N"),
    ("creates_per_minute", "VMs created within a minute", int, "N"),
)


@click.group(name="projects", cls=LazyGroup)
def group() -> None:
    """Manage projects: namespaces with limits.

    VMs, networks, volumes, snapshots and plugins belong to a project, and a key sees one. Administrators choose
    with --project; without it, it is `default`.
    """


project_argument = click.argument("project", shell_complete=project_names)


def _limits(function: F) -> F:
    for name, text, of, word in reversed(_LIMITS):
        flag = "--" + name.removesuffix("_mb").replace("cpu_cores", "cpus").replace("_", "-")
        function = click.option(flag, name, type=of, metavar=word, help=f"Maximum {text}.")(function)
    return function


@command(group, "list")
@listing
async def list_(session: Session) -> None:
    """List projects, with their use and limits."""
    projects = await session.client.projects.list()
    rows = (
        (each.name, *(_of(each, name) for name, _, _, _ in _LIMITS if hasattr(each.used, name))) for each in projects
    )
    session.out.listing(projects, ("NAME", "VMS", "CPUS", "MEMORY (MiB)", "DISK (MiB)", "SNAPSHOTS"), rows)


@command(group, "create")
@click.argument("project")
@_limits
@egress_option("its VMs", default=EGRESS_ALL)
async def create(session: Session, /, project: str, egress: Egress | None, **limits: int | None) -> None:
    """Create a project."""
    body = CreateProject(name=project, quota=Quota(**limits), egress=EGRESS_ALL if egress is None else egress)
    made = await session.client.projects.create(body)
    session.out.result(made, f"project {safe(made.name)} is created")


@command(group, "get")
@project_argument
async def get(session: Session, project: str) -> None:
    """Show a project, with its use and limits."""
    _show(session.out, await session.client.projects.get(project))


@command(group, "limit")
@project_argument
@click.option("--none", "none", is_flag=True, help="Remove all limits first; --egress stays.")
@_limits
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
    _show(session.out, shown)


def _show(out: Output, project: ProjectView) -> None:
    if out.json:
        out.document(project)
        return
    fields = [("name", project.name)]
    for name, _, _, _ in _LIMITS:
        fields.append((name.replace("_", " "), _of(project, name)))
    fields.append(("egress", egress_text(project.egress)))
    out.fields(fields)


def _of(project: ProjectView, name: str) -> str:
    most = getattr(project.quota, name)
    limit = "no limit" if most is None else str(most)
    return f"{used} of {limit}" if (used := getattr(project.used, name, None)) is not None else limit


add_commands(group, "projects", ProjectsOperations, besides=("set_quota", "set_egress"))
