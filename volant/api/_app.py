"""The app: Quart for single answers, plain coroutines for streams, and one middleware around both."""

from __future__ import annotations

import logging
from functools import partial

from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from volant import agui, mcp
from volant.concurrency import FairShare
from volant.http import Limits, Middleware, internal_error, problem_body, too_large
from volant.model import Problem
from volant.operations import TABLE, ApiDeps, Table, check_permission
from volant.relay import Relay

from . import (
    _actions,
    _agent,
    _artifacts,
    _backups,
    _console,
    _devtools,
    _docs,
    _events,
    _logs,
    _metrics,
    _rest,
    _system,
    _tcp,
    _workload_api,
)

_log = logging.getLogger("volant.api")


def create_app(deps: ApiDeps, limits: Limits | None = None, table: Table = TABLE) -> QuartTrio:
    """Returns the app that serves a table of operations, to be handed to `volant.http.serve`."""
    limits = limits or Limits()
    app = QuartTrio("volant.api", static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=limits.json_body, RESPONSE_TIMEOUT=None, BODY_TIMEOUT=30)
    # A proxied path must stay as it is, and redirects help no client of an API.
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    _answer_errors(app, limits)
    _rest.add_routes(app, deps, table)
    for resource in (_system, _metrics, _workload_api):
        resource.add_routes(app, deps)
    _docs.add_routes(app, deps, table)
    share = FairShare()
    relay = Relay(share)
    streams = [
        *_agent.routes(deps, relay),
        *_actions.routes(deps, relay),
        *_devtools.routes(deps, relay, share),
        *_events.routes(deps),
        *_logs.routes(deps, share),
        *_console.routes(deps, share),
        *_tcp.routes(deps, share),
        *_backups.routes(deps, limits),
        *_artifacts.routes(deps),
        *agui.routes(deps, limits),
        *mcp.routes(deps, limits, table),
    ]
    authorize = partial(check_permission, deps, table)
    app.asgi_app = Middleware(app.asgi_app, streams, deps.access, limits, authorize)  # type: ignore[method-assign]
    return app


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
    response = Response(
        problem_body(problem, _request_id()), status=problem.status, content_type="application/problem+json"
    )
    response.headers["Cache-Control"] = "no-store"
    if problem.retry_after_s is not None:
        response.headers["Retry-After"] = str(problem.retry_after_s)
    return response


def _request_id() -> str:
    return str(request.scope["state"]["request_id"])
