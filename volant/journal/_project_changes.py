"""Decides changes of projects."""

from __future__ import annotations

import msgspec

from volant.model import DEFAULT_PROJECT, Key, Problem, Project, check_name, first_few, no_such_project, parse_egress

from . import messages
from ._changes import decides
from ._quotas import require_project
from ._stage import Stage

_MAX_PROJECTS = 1000


@decides
def _add_project(stage: Stage, message: messages.AddProject) -> Project:
    request = message.request
    name = check_name(request.name, "name")
    if stage.project(Key(name, name)) is not None:
        raise Problem(
            409, "project-exists", f"there is a project named {name!r} already", field="name",
            hint="choose another name",
        )  # fmt: skip
    if len(stage.projects) >= _MAX_PROJECTS:
        raise Problem(
            409, "too-many-projects", f"there are {_MAX_PROJECTS} projects already, which is the limit",
            hint="delete one first",
        )  # fmt: skip
    project = Project(name=name, quota=request.quota, egress=parse_egress(request.egress), created_at=stage.now)
    stage.put(project)
    return project


@decides
def _set_quota(stage: Stage, message: messages.SetQuota) -> Project:
    """What a project has already may be more than the limit; then it can't have more."""
    return _changed(stage, message.project, quota=message.quota)


@decides
def _set_egress(stage: Stage, message: messages.SetProjectEgress) -> Project:
    """VMs that it has already keep their policies."""
    return _changed(stage, message.project, egress=parse_egress(message.egress))


def _changed(stage: Stage, name: str, **members: object) -> Project:
    before = require_project(stage, name)
    project = msgspec.structs.replace(before, **members)
    if project != before:
        stage.put(project)
    return project


@decides
def _remove_project(stage: Stage, message: messages.RemoveProject) -> None:
    name = message.project
    project = stage.project(Key(name, name))
    if project is None:
        raise no_such_project(name)
    if name == DEFAULT_PROJECT:
        raise Problem(409, "project-built-in", f"project {name!r} always exists, and can't be deleted")
    left = [f"VM {row.name}" for row in stage.all_rows() if row.project == name]
    left += [f"{kind} {one.name}" for kind, one in stage.everything_named() if one.project == name and one != project]
    left += [f"key {key.name}" for key in stage.keys.values() if key.project == name]
    if left:
        raise Problem(
            409, "project-in-use", f"project {name!r} is not empty: {first_few(left)}", hint="delete these first"
        )
    stage.drop(project)
