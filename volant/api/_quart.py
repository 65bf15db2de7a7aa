"""The Quart app, for operations with a whole request and a single answer.

Only `_app.py` imports this module, and late, because Quart and its dependencies take as long to import as half of the
daemon.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import msgspec
from quart import Response, request
from quart.ctx import RequestContext
from quart.routing import QuartRule
from quart.typing import ResponseReturnValue
from quart.wrappers.base import BaseRequestWebsocket
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.routing import MapAdapter

from volant.http import Limits, internal_error, problem_body, too_large
from volant.model import Problem
from volant.operations import ApiDeps, Table

from . import _metrics, _rest, _workload_api
from ._json import no_query
from ._openapi import document

_log = logging.getLogger("volant.api")


def quart_app(deps: ApiDeps, limits: Limits, table: Table) -> QuartTrio:
    """Returns the app that serves the operations of a table without a route of their own."""
    app = _App("volant.api", static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=limits.json_body, RESPONSE_TIMEOUT=None, BODY_TIMEOUT=30)
    # A proxied path must stay as it is, and redirects help no client of an API.
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    _answer_errors(app, limits)
    app.operations = _rest.add_routes(app, deps, table)
    for resource in (_metrics, _workload_api):
        resource.add_routes(app, deps)
    _add_document(app, deps, table)
    return app


def _add_document(app: QuartTrio, deps: ApiDeps, table: Table) -> None:
    """Adds `/openapi.json`, which the page `/docs` shows (`volant.web`)."""
    encoded = b""

    @app.get("/openapi.json")
    async def openapi() -> Response:
        nonlocal encoded
        no_query()
        # Built at the first request, in a thread, as it reads source files.
        encoded = encoded or await deps.host.threads.run(lambda: msgspec.json.encode(document(table)))
        return Response(encoded, content_type="application/json")


class _Rule(QuartRule):
    """The rule of a route for which `url_for` is not used.

    For `url_for`, Werkzeug compiles two functions per rule from syntax trees. That took nine tenths of the time to
    create the app, right after the daemon's start.
    """

    def _compile_builder(self, append_unknown: bool = True) -> Callable[..., tuple[str, str]]:
        return _no_address


def _no_address(*_: object, **__: object) -> tuple[str, str]:
    raise NotImplementedError("routes of this app are matched, no address is built from them")


class _App(QuartTrio):
    """Serves a request by the operation for which it was admitted, so that its path is matched once. Other requests are
    matched by Werkzeug, which also finds out why there is no operation: 404 or 405."""

    url_rule_class = _Rule  # type: ignore[assignment] # as Quart does for its own: a rule there is not one of Flask's
    operations: Mapping[str, _rest.Route]

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        return super().create_url_adapter(request) if self._route_of(request) is None else None

    async def dispatch_request(self, request_context: RequestContext | None = None) -> ResponseReturnValue:
        route = self._route_of(request)
        return await (super().dispatch_request(request_context) if route is None else route.serve())

    def _route_of(self, request: BaseRequestWebsocket | None) -> _rest.Route | None:
        operation = None if request is None else request.scope["state"]["operation"]
        return None if operation is None else self.operations.get(operation.name)


def _answer_errors(app: QuartTrio, limits: Limits) -> None:
    async def problem(error: Problem) -> Response:
        return _response(error)

    async def http_error(error: HTTPException) -> Response:
        if isinstance(error, RequestEntityTooLarge):
            return _response(too_large(limits.json_body))
        status = error.code or 500
        words = (error.name or "error").lower()
        detail = {
            404: f"there is nothing at {request.path[:200]}",
            405: f"{request.method} is not possible on {request.path[:200]}",
            408: "the body of the request took too long",
        }.get(status, error.description or words)
        response = _response(Problem(status, words.replace(" ", "-"), detail))
        for name, value in error.get_headers():
            if name.lower() in ("allow", "retry-after"):
                response.headers[name] = value
        return response

    async def unexpected(error: Exception) -> Response:
        _log.error("request %s failed", _request_id(), exc_info=error)
        return _response(internal_error())

    app.register_error_handler(Problem, problem)
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(Exception, unexpected)


def _response(problem: Problem) -> Response:
    # For its record.
    request.scope["state"]["problem"] = problem
    response = Response(
        problem_body(problem, _request_id()), status=problem.status, content_type="application/problem+json"
    )
    response.headers["Cache-Control"] = "no-store"
    if problem.retry_after_s is not None:
        response.headers["Retry-After"] = str(problem.retry_after_s)
    return response


def _request_id() -> str:
    return str(request.scope["state"]["request_id"])
