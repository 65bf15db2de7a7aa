"""`GET /api/v1/vms/{name}/openapi`: the OpenAPI document of a VM's workload, rewritten for clients outside.

A running workload is the best source. It is asked first, at the manifest's path or at `/openapi.json`, where most
frameworks have it. If it has no usable document or does not run, the manifest's own document is used. A document from a
guest is not trusted: it is read within limits, parsed, and serialized again.

All `servers` in it are rewritten, so that clients call the workload through the daemon. They become paths without a
host, relative to the document's address, so they are right for any name of the daemon. The agent serves `/healthz` and
`/v1/…` below `…/agent` itself, so a document with such a path gets the prefix that reaches all paths of the workload,
`…/agent/v1/workload`. A path with `..` in it is left out: joined to a server, it could lead a client with the daemon's
key to another VM.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from copy import deepcopy
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import msgspec
import trio
from quart import Response, request
from quart_trio import QuartTrio

from volant.channel import AgentClient, AgentProtocolError, AgentUnreachable
from volant.http import one_project
from volant.model import Key, Problem, VmRow, is_openapi, is_too_deep
from volant.model.agent import AGENT_PREFIX, HEALTHZ, WORKLOAD_PREFIX
from volant.operations import ApiDeps, enter, find_vm
from volant.relay import SANDBOX, to_port, unreachable

from ._json import json_response, no_query

_USUAL_PATH = "/openapi.json"
_ANSWER_S = 10.0
_MAX_ANSWER = 1024 * 1024
_MAX_SERVERS = 16
_MAX_URL = 2048
"""Maximum length of a server's address, before and after its variables are filled in, in characters: the variables of a
hostile document could expand to many gigabytes."""
_MAX_VARIABLE = 256
_VARIABLE = re.compile(r"{([^{}]*)}")
_SLASH = re.compile(r"[/\\]")
_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace", "query")


def add_routes(app: QuartTrio, deps: ApiDeps) -> None:
    """Adds the routes of this resource."""

    @app.get("/api/v1/vms/<name>/openapi")
    async def workload_openapi(name: str) -> Response:
        no_query()
        row = find_vm(deps, Key(one_project(request.scope), name))
        declared = row.manifest.openapi
        path = declared if isinstance(declared, str) else _USUAL_PATH
        try:
            found = await _ask_workload(deps, row, path, promised=isinstance(declared, str))
        except Problem:
            if not isinstance(declared, dict):
                raise
            # A copy, as the document is rewritten below and the manifest is the VM's.
            found, path = deepcopy(declared), "/"
        # A document of a megabyte takes a second, which others must not wait for.
        response = json_response(await deps.host.threads.run(through_proxy, found, row.name, path))
        response.headers[SANDBOX[0].decode()] = SANDBOX[1].decode()
        return response


async def _ask_workload(deps: ApiDeps, row: VmRow, path: str, *, promised: bool) -> dict[str, Any]:
    """Returns the document that the workload serves. :raises Problem: 404, there is none; 502, it can't be read."""
    port = row.manifest.workload.port if row.manifest.workload is not None else None
    if port is None:
        raise _none(row, "its plugin names none, and no workload that serves HTTP")
    try:
        _, client = await enter(deps, row.key)
    except Problem as problem:
        if problem.status != 409:
            raise
        why = f"only its workload could have it, and {problem.detail}"
        raise _none(row, why, hint="start the VM, and ask again") from None
    with trio.move_on_after(_ANSWER_S) as deadline:
        async with to_port(client, row.name, port) as inner:
            body = await _fetch(inner, row, path, port, promised=promised)
    if deadline.cancelled_caught:
        raise _broken(row, f"did not answer {path} within {_ANSWER_S:g} s")
    if isinstance(body, Problem):
        raise body
    try:
        return _parsed(body, row, path)
    except Problem as problem:
        if promised:
            raise
        # A workload may answer any path with something.
        raise _none(row, f"its plugin names none, and {problem.detail}") from None


async def _fetch(client: AgentClient, row: VmRow, path: str, port: int, *, promised: bool) -> bytes | Problem:
    headers = [
        (b"host", b"localhost:%d" % port),
        (b"accept", b"application/vnd.oai.openapi+json, application/json"),
        (b"accept-encoding", b"identity"),
    ]
    try:
        async with client.stream("GET", path, headers, timeout_s=_ANSWER_S) as response:
            kinds = dict(response.headers)
            kind = kinds.get(b"content-type", b"").lower()
            # A web server may have a page for every path, or redirect to a login.
            if not promised and (300 <= response.status < 500 or b"html" in kind):
                return _none(row, f"its plugin names none, and its workload has no {path}")
            if response.status != 200:
                return _broken(row, f"answers {path} with the status {response.status}")
            if b"yaml" in kind:
                return _broken(row, f"serves {path} as YAML", hint="let it serve JSON, or put it into the manifest")
            if kinds.get(b"content-encoding", b"identity").lower() != b"identity":
                return _broken(row, f"serves {path} in an encoding that was not requested")
            return await response.read(_MAX_ANSWER)
    except (AgentUnreachable, AgentProtocolError) as error:
        return unreachable(row.name, str(error))


def _parsed(body: bytes, row: VmRow, path: str) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _broken(row, f"serves no JSON at {path}: {error}") from None
    if not is_openapi(document):
        raise _broken(row, f"serves JSON at {path} that is no OpenAPI document of version 3")
    if is_too_deep(document):
        raise _broken(row, f"serves a document at {path} that is nested too deeply")
    assert isinstance(document, dict)
    return document


def _none(row: VmRow, why: str, *, hint: str | None = None) -> Problem:
    return Problem(404, "openapi-not-found", f"VM {row.name!r} has no OpenAPI document: {why}", vm=row.name, hint=hint)


def _broken(row: VmRow, what: str, *, hint: str | None = None) -> Problem:
    return Problem(502, "openapi-broken", f"the workload of VM {row.name!r} {what}", vm=row.name, hint=hint)


def through_proxy(document: dict[str, Any], vm: str, path: str) -> dict[str, Any]:
    """Returns the document with servers that lead through the daemon. `path` is its path in the workload."""
    agent = f"/api/v1/vms/{vm}/agent"
    bases = {base for owner in _owners(document) for base, _ in _bases(owner.get("servers"), path)} or {""}
    paths = document.get("paths")
    if isinstance(paths, dict):
        document["paths"] = paths = {key: item for key, item in paths.items() if not _climbs(key)}
    hidden = _is_hidden(bases, paths if isinstance(paths, dict) else ())
    prefix = agent + (WORKLOAD_PREFIX.rstrip("/") if hidden else "")
    owners = [*_owners(document)]
    _drop_other_servers(document, {id(owner) for owner in owners})
    for owner in owners:
        if owner is document or "servers" in owner:
            found = _bases(owner.get("servers"), path) or [("", None)]
            owner["servers"] = [
                {"url": prefix + base, **({} if text is None else {"description": text})} for base, text in found
            ]
    return document


def _drop_other_servers(document: dict[str, Any], owners: Collection[int]) -> None:
    """Removes everything else that leads a client away from the workload: servers behind references, in callbacks,
    webhooks and links, and parameter values that climb out of a path. The servers of the objects in `owners` stay."""
    left: list[Any] = [document]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            if id(each) not in owners and isinstance(each.get("servers"), list):
                del each["servers"]
            if isinstance(server := each.get("server"), dict) and isinstance(server.get("url"), str):
                del each["server"]
            for name in [name for name in ("const", "default", "example") if _is_climbing(each.get(name))]:
                del each[name]
            for name in ("enum", "examples"):
                if isinstance(values := each.get(name), list):
                    each[name] = [value for value in values if not _is_climbing(value)]
        members = each.values() if isinstance(each, dict) else each
        left += [member for member in members if isinstance(member, dict | list)]


def _is_climbing(value: object) -> bool:
    return isinstance(value, str) and _climbs(value)


def _is_hidden(bases: Collection[str], paths: Collection[str]) -> bool:
    """Returns whether a route of the agent hides one of these paths below one of these bases.

    There can be tens of thousands of both. A base that begins unlike the agent's routes is skipped without looking at
    the paths.
    """
    for base in bases:
        if base.startswith(AGENT_PREFIX) and paths:
            return True
        if HEALTHZ.startswith(base) or AGENT_PREFIX.startswith(base):
            for path in paths:
                if f"{base}{path}" == HEALTHZ or f"{base}{path}".startswith(AGENT_PREFIX):
                    return True
    return False


def _owners(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields all objects that can have `servers`: the document, its paths, their methods."""
    yield document
    paths = document.get("paths")
    for item in paths.values() if isinstance(paths, dict) else ():
        if isinstance(item, dict):
            yield item
            yield from (item[method] for method in _METHODS if isinstance(item.get(method), dict))


def _bases(servers: object, path: str) -> list[tuple[str, str | None]]:
    """Returns the paths of `servers` at the workload, with their descriptions."""
    found: dict[str, str | None] = {}
    for server in servers[:_MAX_SERVERS] if isinstance(servers, list) else ():
        url = server.get("url") if isinstance(server, dict) else None
        if not isinstance(url, str) or len(url) > _MAX_URL:
            continue
        variables = server.get("variables")
        try:
            filled = _filled(url, variables if isinstance(variables, dict) else {})
            base = urlsplit(urljoin(path, filled or "/")).path.rstrip("/")
        except ValueError:
            continue
        text = server.get("description")
        if len(filled) <= _MAX_URL and (not base or base.startswith("/")) and not _climbs(base):
            found.setdefault(base, text if isinstance(text, str) else None)
    return list(found.items())


def _climbs(path: str) -> bool:
    """Returns whether a client that joins the path to a prefix may get outside of the prefix."""
    return ".." in _SLASH.split(unquote(path))


def _filled(url: str, variables: dict[str, Any]) -> str:
    """Fills in the variables of a URL. :raises ValueError: the result would be too long."""

    def default(name: re.Match[str]) -> str:
        variable = variables.get(name[1])
        filled = variable.get("default") if isinstance(variable, dict) else None
        if not isinstance(filled, str):
            return ""
        if len(filled) > _MAX_VARIABLE:
            raise ValueError("a variable of the address is too long")
        return filled

    return _VARIABLE.sub(default, url)
