"""Renders results, the first time and when a request is repeated in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from quart import Response

from volant.http import json_response
from volant.journal import (
    NetworkCreated,
    PluginChanged,
    PluginInstalled,
    Refusal,
    Result,
    SnapshotTaken,
    VmChanged,
    VmCreated,
    VmForked,
)

from ._idempotency import Outcome
from ._params import etag


def respond(outcome: Outcome[Any]) -> Response:
    """Returns the response for an outcome. :raises Problem: it is a refusal."""
    status, body, headers = _render(outcome.result)
    response = json_response(body, status)
    response.headers.extend(headers)
    if outcome.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def _render(result: Result) -> tuple[int, object, Mapping[str, str]]:
    match result:
        case VmCreated(vm, revision):
            return 201, vm, {"ETag": etag(vm.id, revision), "Location": f"/api/v1/vms/{quote(vm.name)}"}
        case VmChanged(vm, revision):
            return 200, vm, {"ETag": etag(vm.id, revision)}
        case VmForked(copies):
            return 201, copies, {}
        case SnapshotTaken(snapshot):
            return 201, snapshot, {"Location": f"/api/v1/snapshots/{quote(snapshot.name)}"}
        case NetworkCreated(network):
            return 201, network, {"Location": f"/api/v1/networks/{quote(network.name)}"}
        case PluginInstalled(plugin):
            return 201, plugin, {"Location": f"/api/v1/plugins/{plugin.name}"}
        case PluginChanged(plugin):
            return 200, plugin, {}
        case Refusal():
            raise result.problem()
