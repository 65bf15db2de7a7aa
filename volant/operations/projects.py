"""Projects: namespaces with limits."""

from __future__ import annotations

from volant.journal import AddProject, ProjectCreated, RemoveProject, SetProjectEgress, SetQuota, ask_journal, used_by
from volant.logs import VmLogs
from volant.model import CreateProject, Permission, Problem, Project, ProjectView, Quota, SetEgress, no_such_project
from volant.oci import ImageLibrary, OciError

from ._context import Context
from ._table import TABLE

_PROJECT = "/api/v1/projects/{name}"


@TABLE.operation("GET /api/v1/projects", permission=Permission.VIEW, answer="The projects, by name")
async def list_projects(context: Context) -> list[ProjectView]:
    """List projects: all for an administrator, otherwise the caller's own."""
    names = {"default", *(project.name for project in context.deps.store.projection.projects.values())}
    own = context.caller.project
    return [_shown(context, name) for name in sorted(names) if own in (None, name)]


@TABLE.operation(
    "POST /api/v1/projects", permission=Permission.ADMIN, status=201, answer="The project", errors=(503,),
    idempotent=True, journaled=True,
    examples={"Ten VMs at most": {"name": "shop", "quota": {"vms": 10, "memory_mb": 8192}}},
)  # fmt: skip
async def create_project(context: Context, *, body: CreateProject) -> ProjectCreated:
    """Create a project: a separate namespace with limits.

    A key has one project. An administrator chooses one with the header `Volant-Project`, or `project` in the query.
    """
    if context.deps.store.projection.project(body.name) is None:
        # A daemon that was killed may have left something, and a fetch may have ended after its project.
        await clear_project(context.deps.logs, context.deps.oci, body.name, "not created")
    return ProjectCreated.of(await ask_journal(context.deps.journal, AddProject(body, context.key)))


@TABLE.operation(f"GET {_PROJECT}", permission=Permission.VIEW, answer="The project")
async def get_project(context: Context, name: str) -> ProjectView:
    """Get a project, with its limits and its use of them."""
    return _shown(context, name)


@TABLE.operation(
    f"PUT {_PROJECT}/quota",
    permission=Permission.ADMIN,
    answer="The project",
    errors=(503,),
    journaled=True,
    examples={"Ten VMs at most": {"vms": 10, "memory_mb": 8192}},
)
async def set_quota(context: Context, name: str, *, body: Quota) -> ProjectView:
    """Replace the limits of a project; a missing or null member means no limit.

    VMs, disks and snapshots that already exceed a new limit stay. Further ones get 409 `quota-exceeded`, or 429 for too
    many creates per minute.
    """
    await ask_journal(context.deps.journal, SetQuota(name, body))
    return _shown(context, name)


@TABLE.operation(
    f"PUT {_PROJECT}/egress",
    permission=Permission.ADMIN,
    answer="The project",
    errors=(422, 503),
    journaled=True,
    examples={
        "One registry": {"egress": [{"name": "registry.example.com", "ports": [443]}]},
        "Nowhere": {"egress": "none"},
    },
)
async def set_project_egress(context: Context, name: str, *, body: SetEgress) -> ProjectView:
    """Replace the egress policy of a project, which limits the destinations of its VMs.

    New VMs without a policy of their own use it. Requests for more get 409 `egress-not-allowed`, as do forks and
    restored VMs whose original may connect to more. Present VMs keep their policies.
    """
    await ask_journal(context.deps.journal, SetProjectEgress(name, body.egress))
    return _shown(context, name)


@TABLE.operation(f"DELETE {_PROJECT}", permission=Permission.ADMIN, answer="Deleted", errors=(409, 503), journaled=True)
async def delete_project(context: Context, name: str) -> None:
    """Delete an empty project that no key belongs to.

    This also deletes the logs of its deleted VMs and its image names. A new project with the same name starts empty.
    """
    await ask_journal(context.deps.journal, RemoveProject(name))
    await clear_project(context.deps.logs, context.deps.oci, name, "deleted")


async def clear_project(logs: VmLogs, oci: ImageLibrary, name: str, state: str = "deleted") -> None:
    """Removes the logs and image names of a deleted project on this host. :raises Problem: 503, the disk fails."""
    try:
        await logs.discard_project(name)
        await oci.forget_project(name)
    except (OSError, OciError) as error:
        raise Problem(
            503,
            "project-not-cleared",
            f"project {name!r} is {state}, and logs or names of images of it are left: {error}",
            hint="check the disk; they are removed before a project of that name is created",
        ) from error


def _shown(context: Context, name: str) -> ProjectView:
    projection = context.deps.store.projection
    project: Project | None = None
    if context.caller.project in (None, name):
        project = projection.project(name)
    if project is None:
        raise no_such_project(name)
    here = used_by(name, projection.rows(), projection.volumes.values(), projection.snapshots.values())
    used = here + context.deps.store.used_elsewhere(name)
    return ProjectView(name=name, quota=project.quota, egress=project.egress, used=used, created_at=project.created_at)
