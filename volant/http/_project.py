"""The project of a request: the caller's own, or the choice of an administrator.

The header `Volant-Project` selects it, or `?project=` for clients that can't set headers, unless the query belongs to a
guest.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote_to_bytes

from volant.model import DEFAULT_PROJECT, Problem, check_name, invalid

EVERY_PROJECT = "*"
_HEADER = b"volant-project"
_PARAMETER = b"project"


def choose_project(scope: Any, own: str | None, *, in_query: bool) -> None:
    """Stores the project of a request in its scope, and removes the parameter from the query.

    :param own: the only project that the caller may use; None for all
    :param in_query: whether the query may name the project
    :raises Problem: 400, the name is invalid, or two are given; 403, it is another project than the caller's, whether
        it exists or not.
    """
    given = {value.strip() for name, value in scope["headers"] if name == _HEADER}
    if in_query and b"project" in scope["query_string"]:
        others = []
        for pair in scope["query_string"].split(b"&"):
            name, _, value = pair.partition(b"=")
            if name == _PARAMETER:
                given.add(unquote_to_bytes(value.replace(b"+", b" ")))
            else:
                others.append(pair)
        scope["query_string"] = b"&".join(others)
    given.discard(b"")
    scope["state"]["names_project"] = bool(given)
    scope["state"]["project"] = _chosen([value.decode("latin-1") for value in given], own)


def _chosen(given: list[str], own: str | None) -> str:
    if not given:
        return own or DEFAULT_PROJECT
    if len(given) > 1:
        raise invalid("project", f"two projects are named, {given[0][:80]!r} and {given[1][:80]!r}", hint="name one")
    wanted = given[0]
    if own is not None and wanted != own:
        raise Problem(
            403, "forbidden", f"this caller can use the project {own!r} alone", field="project",
            hint="leave `project` out",
        )  # fmt: skip
    return wanted if wanted == EVERY_PROJECT else check_name(wanted, "project")


def seen_project(scope: Any) -> str | None:
    """Returns the project to which a view of shared objects is limited; None for all of them, for administrators
    without a project."""
    if not names_project(scope):
        own: str | None = scope["state"]["caller"].project
        return own
    return listed_project(scope)


def project_of_link(scope: Any) -> list[tuple[str, str]]:
    """Returns the query parameters for links to the same project."""
    return [("project", scope["state"]["project"])] if names_project(scope) else []


def names_project(scope: Any) -> bool:
    """Returns whether a request names a project."""
    named: bool = scope["state"]["names_project"]
    return named


def one_project(scope: Any) -> str:
    """Returns the project in which names are looked up. :raises Problem: 400, the request is for all projects."""
    project: str = scope["state"]["project"]
    if project == EVERY_PROJECT:
        raise invalid("project", "project is '*', and this is about one project", hint="name it; '*' is for lists")
    return project


def listed_project(scope: Any) -> str | None:
    """Returns the project to list; None for all projects."""
    project: str = scope["state"]["project"]
    return None if project == EVERY_PROJECT else project
