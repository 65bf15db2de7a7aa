"""The REST route of each operation: parses a request by its declaration, calls it, and renders the result."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from hashlib import sha256
from typing import Any, Generic, NamedTuple, TypeVar, cast
from urllib.parse import urlencode

import msgspec
from quart import Response, request
from quart_trio import QuartTrio

from volant.http import Nothing, Query, has_etag, one_project, project_of_link
from volant.journal import DuplicateRequest, IdempotencyKey, Refusal, Result, StoreRefusal, ask_journal
from volant.model import Problem, current_cause, invalid
from volant.operations import (
    DEFAULT_WAIT_S,
    TIMEOUT,
    WAIT,
    ApiDeps,
    Context,
    OneOf,
    Operation,
    Page,
    Table,
    begin,
    name_target,
    show,
    wait_for,
)
from volant.vm import Version

from ._json import empty_response, json_response, read_body, read_body_or, read_one_of

R = TypeVar("R", bound=Result)

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z")

_encode = msgspec.json.Encoder(order="sorted").encode

_ETAG = re.compile(r'"(\d{1,18})-(\d{1,18})"\Z', re.ASCII)


def if_match() -> Collection[Version] | None:
    """Returns the versions of a VM in `If-Match`, one of which must be the present one; None for any version.

    A foreign or weak `ETag` matches no version (RFC 9110, 13.1.1).

    :raises Problem: 400, the header is empty
    """
    given = request.headers.getlist("If-Match")
    if not given:
        return None
    tags = [tag.strip() for line in given for tag in line.split(",")]
    if not any(tags):
        raise invalid(
            "If-Match", "the header If-Match is empty", hint="send the ETag of the VM, or leave the header out"
        )
    if "*" in tags:
        return None
    return [Version(int(found[1]), int(found[2])) for tag in tags if (found := _ETAG.match(tag))]


def if_none_match(etag: str) -> bool:
    """Returns whether the client already has this version."""
    return has_etag(request.headers.getlist("If-None-Match"), etag)


def add_routes(app: QuartTrio, deps: ApiDeps, table: Table) -> Mapping[str, Route]:
    """Adds the route of each operation of a table that has a function; returns them by the names of the operations."""
    repeats = Repeats(deps)
    routes = {one.name: Route(one, deps, repeats) for one in table if one.call is not None}
    for name in routes:
        rule = table[name].path.replace("{", "<").replace("}", ">")
        app.add_url_rule(rule, name, methods=[table[name].method])
    return routes


class Route:
    """The route of an operation."""

    def __init__(self, operation: Operation, deps: ApiDeps, repeats: Repeats) -> None:
        assert operation.call is not None
        self._operation = operation
        self._call = operation.call
        self._deps = deps
        self._repeats = repeats
        self._read_body = _body_reader(operation)
        self._arguments = [place for place, part in enumerate(operation.path.split("/")) if part.startswith("{")]

    async def serve(self) -> Response:
        """Answers the current request. :raises Problem: as the operation does."""
        operation = self._operation
        wait, timeout_s, parameters = self._parameters()
        if self._read_body is not None:
            body = await self._read_body()
            if operation.body is not Nothing:
                parameters["body"] = body
        context = Context(deps=self._deps, scope=request.scope)
        if operation.if_match:
            context.versions = if_match()
        parts = request.path.split("/")
        arguments = [parts[place] for place in self._arguments]
        name_target(arguments, parameters.get("body"))

        async def act(key: IdempotencyKey | None) -> Any:
            context.key = key
            await begin(context, operation)
            return await self._call(context, *arguments, **parameters)

        if operation.idempotent:
            outcome = await self._repeats.run((parameters, context.versions), act)
        else:
            outcome = Outcome(await act(None))
        cause = current_cause.get()
        if cause is not None:
            cause.repeated = outcome.replayed
        if not wait:
            response = _render(operation, outcome)
            if context.missing_hosts:
                response.headers["Volant-Missing-Hosts"] = ", ".join(sorted(context.missing_hosts))
            return response
        result, waited = await wait_for(context, outcome.result, wait, timeout_s)
        response = _render(operation, outcome._replace(result=result))
        response.headers["Volant-Wait"] = waited
        return response

    def _parameters(self) -> tuple[Collection[str], float, dict[str, Any]]:
        """Returns the states to wait for, the maximum wait, and the operation's own parameters."""
        operation = self._operation
        parameters = dict(operation.defaults)
        if not request.query_string:
            return (), DEFAULT_WAIT_S, parameters
        query = Query(request.query_string)
        wait: Collection[str] = ()
        timeout_s = DEFAULT_WAIT_S
        if operation.waits_for is not None:
            wait = WAIT.read(query, "wait", wait)
            timeout_s = TIMEOUT.read(query, "timeout", timeout_s)
        for name, parameter in operation.query.items():
            parameters[name] = parameter.read(query, parameter.name or name, parameters[name])
        query.done()
        return wait, timeout_s, parameters


def _body_reader(operation: Operation) -> Callable[[], Awaitable[Any]] | None:
    body = operation.body
    if body is None:
        return None
    if isinstance(body, OneOf):
        first, second = body.types
        required = {field.name for field in msgspec.structs.fields(first) if field.required}
        (member,) = required - set(second.__struct_fields__)
        return partial(read_one_of, member, first, second)
    if operation.body_optional:
        return partial(read_body_or, body())
    return partial(read_body, body)


def _render(operation: Operation, outcome: Outcome[Any]) -> Response:
    shown = show(outcome.result)
    conditional = operation.method == "GET" and shown.etag is not None and not request.query_string
    if conditional and if_none_match(str(shown.etag)):
        response = empty_response(304)
        response.headers["ETag"] = str(shown.etag)
        return response
    if operation.status == 204:
        return empty_response(204)
    response = json_response(shown.view, operation.status)
    if shown.etag is not None:
        response.headers["ETag"] = shown.etag
    if shown.location is not None and operation.status == 201:
        response.headers["Location"] = shown.location
    if operation.secret:
        response.headers["Cache-Control"] = "no-store"
    if outcome.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    if isinstance(outcome.result, Page):
        _add_links(response, outcome.result)
    return response


def _add_links(response: Response, page: Page[Any]) -> None:
    response.headers["Volant-Event-Id"] = page.event_id
    if page.next_cursor is not None:
        pairs = [(key, value) for key, value in request.args.items(multi=True) if key != "cursor"]
        query = urlencode([*pairs, *project_of_link(request.scope), ("cursor", str(page.next_cursor))])
        response.headers["Link"] = f'<{request.path}?{query}>; rel="next"'


# `Idempotency-Key`: a repeated POST is executed once, and gets the first response again.
#
# The journal stores a result in the transaction of the change, and only the journal decides whether a request is
# repeated (docs/explanation/journal.md). This module computes the digests of a request. A malformed request (400, 408,
# 413, 415) is refused before that and not stored: its response is the same each time, and there is no decoded body to
# compare. Tickets are not stored either, as secrets must not be written to the disk.


class Outcome(NamedTuple, Generic[R]):
    """The result of a request; `replayed` if it is the stored one of the first request."""

    result: R
    replayed: bool = False


class Repeats:
    """Detects repeated requests."""

    def __init__(self, deps: ApiDeps) -> None:
        self._deps = deps
        self._running: set[bytes] = set()

    async def run(self, content: object, act: Callable[[IdempotencyKey | None], Awaitable[R]]) -> Outcome[R]:
        """Executes the current request, unless it was executed before.

        :param content: the parts of the request, besides its path, that must be equal in a repetition
        :param act: executes it; passes its argument to the journal
        :raises Problem: 400, the key is malformed; 409, the first request is still running; 422, the key was used for
            another request; and the errors of `act`
        """
        text = _idempotency_key()
        if text is None:
            return Outcome(await act(None))
        caller = request.scope["state"]["caller"].id
        project = one_project(request.scope)
        of = (caller, request.method, request.path, project, text)
        key = IdempotencyKey(_digest(of), _digest(content), project)
        stored = self._deps.store.responses.find(key, self._deps.host.clock.now())
        if stored is not None:
            return _replay(stored)
        if key.scope in self._running:
            raise Problem(
                409,
                "idempotency-key-in-use",
                "the request with this Idempotency-Key is still running",
                field="Idempotency-Key",
                hint="send it again in a moment",
            )
        self._running.add(key.scope)
        try:
            return Outcome(await self._act(act, key))
        except DuplicateRequest as duplicate:
            return _replay(duplicate.result)
        finally:
            self._running.discard(key.scope)

    async def _act(self, act: Callable[[IdempotencyKey | None], Awaitable[R]], key: IdempotencyKey) -> R:
        try:
            return await act(key)
        except Problem as refusal:
            # One that says to try again later is no answer to keep.
            if refusal.status < 500 and refusal.status != 429 and refusal.field != "Idempotency-Key":
                await ask_journal(self._deps.journal, StoreRefusal(Refusal.of(refusal), key))
            raise


def _replay(result: Result) -> Outcome[R]:
    if isinstance(result, Refusal):
        raise result.problem()
    # The key counts for one method and path, so for one type of result.
    return Outcome(cast(R, result), replayed=True)


def _idempotency_key() -> str | None:
    given = request.headers.getlist("Idempotency-Key")
    if not given:
        return None
    if len(given) > 1 or not _IDEMPOTENCY_KEY.match(given[0]):
        raise invalid(
            "Idempotency-Key",
            "the header Idempotency-Key is not one word of 1 to 255 visible ASCII characters",
            hint="use a UUID, for instance",
        )
    return str(given[0])


def _digest(value: Any) -> bytes:
    return sha256(_encode(value)).digest()
