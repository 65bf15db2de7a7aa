"""Hooks of schemathesis, which loads this file: requests reach a guest, and none waits long.

There are at most two VMs. `demo` always runs, for requests that go into a guest: its workload answers any request, also
on port 9000. `other` is for requests that create, change and delete VMs.
"""

from __future__ import annotations

import base64
import os
import random
from typing import Any

import requests
import schemathesis
from schemathesis.core.parameters import ParameterLocation

from volant.model import Problem, parse_duration

schemathesis.serializer.alias("application/vnd.sqlite3", "application/octet-stream")

STREAM_S = 1.0
"""Seconds for which an event stream is read; a valid one never ends."""

_chance = random.Random(0)
_TRUE = (True, "true", "1", "")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Changes a request before it is sent."""
    del context
    path, query = case.path, case.query
    if isinstance(case.body, dict):
        case.body = _with_integers(case.body)
    fits = case.meta.generation.mode is schemathesis.GenerationMode.POSITIVE
    if fits and case.headers and case.headers.get("Volant-Project") == "*":
        # Only what lists takes all projects.
        case.headers.pop("Volant-Project")
    if case.meta.is_negative_at(ParameterLocation.PATH):
        return
    if "/vms/{name}" in path:
        inside = case.method == "GET" or any(part in path for part in ("/agent", "/ports/", "/actions/", "/devtools/"))
        # Without this, a request waits a minute for a browser that does not listen.
        if _chance.random() < 0.7 or "/devtools" in path:
            case.path_parameters["name"] = "demo" if inside else "other"
        elif not inside and case.path_parameters["name"] == "demo":
            case.path_parameters["name"] = "other"
    if "/ports/" in path and _chance.random() < 0.7:
        case.path_parameters["port"] = 9000
    if "/actions/" in path and _chance.random() < 0.7:
        case.path_parameters |= {"plugin": "web", "action": "greet"}
    if path == "/api/v1/vms" and case.method == "POST" and isinstance(case.body, dict):
        if isinstance(case.body.get("name"), str) and _chance.random() < 0.5:
            case.body["name"] = "other"
        if fits and case.headers and "Volant-Registry-Auth" in case.headers:
            # The document does not say what the base64 contains.
            case.headers["Volant-Registry-Auth"] = base64.b64encode(b'{"auths":{}}').decode()
        # The pattern of durations cannot express their limits.
        if fits and not _is_duration(case.body.get("ttl", "1s"), 1, 366 * 86400):
            case.body["ttl"] = "1h"
        replicate = case.body.get("replicate") or {}
        # It also cannot require `replicate` for only one value of `failover`.
        needs_one = replicate or case.body.get("failover") == "restore"
        if fits and needs_one and not _is_duration(replicate.get("every"), 10, 86400):
            case.body["replicate"] = {"every": "1h"}
    if path in ("/api/v1/vms", "/api/v1/templates") and isinstance(case.body, dict):
        memory_mb = case.body.get("memory_mb")
        # The document does not know how much the boot image needs.
        if isinstance(memory_mb, int) and 64 <= memory_mb < 128:
            case.body["memory_mb"] = 128
    if path == "/api/v1/vms" and isinstance(case.body, dict) and isinstance(case.body.get("image"), str):
        # A registry that nobody can reach is tried several times, and no pattern has the grammar of references.
        if _chance.random() < 0.95:
            case.body.pop("image")
        elif fits:
            case.body["image"] = "oci:/nowhere"
    if path == "/api/v1/images/pull" and isinstance(case.body, dict) and fits:
        case.body["reference"] = "oci:/nowhere"
    if path in ("/api/v1/events/vms", "/api/v1/events/images"):
        kwargs["timeout"] = STREAM_S
        if fits and _chance.random() < 0.8:
            # With many events, schemathesis leaves before the timeout.
            case.query = {"since": "0"}
            case.headers.pop("Last-Event-ID", None)
    if path == "/api/v1/system/drain":
        # `demo` has to keep running; `grace` is only valid together with this.
        if query.get("stop_vms") in _TRUE:
            query["stop_vms"] = "false"
        if fits:
            query.pop("grace", None)
    if path == "/api/v1/agui":
        _shorten(query, "duration")
    if "wait" in query:
        _shorten(query, "timeout")
    if query.get("dry_run") in ("", "1", "0"):
        # The daemon also takes these words for a boolean.
        query["dry_run"] = "true" if fits else "perhaps"
    if query.get("follow") in _TRUE:
        query["follow"] = "false"


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Undoes effects that would disturb other requests."""
    del context
    if case.path == "/api/v1/system/drain" and response.status_code == 200:
        url = response.request.url.partition("?")[0].replace("/drain", "/undrain")
        requests.post(url, headers={"X-Volant-API-Key": os.environ["VOLANT_API_KEY"]}, timeout=20)


def _shorten(query: dict[str, Any], name: str) -> None:
    """Shortens a duration. An invalid or too long one stays as it is, because the daemon refuses it at once."""
    if _is_duration(query.get(name, "0s"), 0, 600):
        query[name] = "50ms"


def _is_duration(value: Any, least_s: float, most_s: float) -> bool:
    try:
        return parse_duration(str(value), "", minimum_s=least_s, maximum_s=most_s) >= 0
    except Problem:
        return False


def _with_integers(value: Any) -> Any:
    """In JSON Schema 80.0 is an integer; the daemon refuses it, and the document says so."""
    match value:
        case dict():
            return {name: _with_integers(member) for name, member in value.items()}
        case list():
            return [_with_integers(member) for member in value]
        case float() if value.is_integer():
            return int(value)
    return value
