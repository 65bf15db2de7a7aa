"""The table of operations: everything that clients can do, declared once.

An operation is a function with a declaration. From the two come its REST route, its entry in the OpenAPI document and
in the reference, its MCP tool and the client's method. An operation that an adapter implements itself, such as a
stream, is declared without a function, so that permissions and documents are complete.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec

from volant.http import JSON, Nothing
from volant.journal import Result, VmChanged, VmCreated, VmForked
from volant.model import WAIT_STATES, Permission, Status, VmView

from ._parameters import Parameter, QueryParameter, Seconds, Words
from ._results import has_etag, has_location, view_type
from ._spans import Spans, spanning

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

ANY = "*/*"
OCTETS = "application/octet-stream"
SQLITE = "application/vnd.sqlite3"

JsonObject = Mapping[str, Any]
"""A JSON object of no fixed shape."""

MAX_WAIT_S = 600.0
DEFAULT_WAIT_S = 60.0

WAIT = Words(help="Wait until the VM has reached one of these states since the request", of=WAIT_STATES)
TIMEOUT = Seconds(help="Maximum wait: default `60s`, at most `10m`", maximum=MAX_WAIT_S)

_IF_MATCH = Parameter(
    "If-Match",
    Annotated[str, msgspec.Meta(pattern=r"[^\s,]")],
    "Fail with 412 unless the VM's `ETag` is one of these",
    place="header",
)
_IF_NONE_MATCH = Parameter("If-None-Match", str, "The `ETag` of the client's copy", place="header")
_IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    Annotated[str, msgspec.Meta(pattern="^[!-~]{1,255}$")],
    "Makes retries safe: a request with the same key is executed once, and its answer is repeated for 24 h",
    place="header",
)

_REGISTRY_AUTH = Parameter(
    "Volant-Registry-Auth",
    str,
    "Credentials for registries: the base64 of a file as `skopeo login --authfile` writes it. Used only for this "
    "image, and not stored",
    place="header",
)


class OneOf(msgspec.Struct, frozen=True):
    """A body of one of these types."""

    types: tuple[Any, ...]


class Answer(msgspec.Struct, frozen=True):
    """A successful response. `type` is None without a body. `items` are the types of the lines, messages or events of a
    stream.

    With the status of an error it is an alternative to `ProblemDetails`.
    """

    text: str
    type: Any = None
    media: str = JSON
    headers: tuple[str, ...] = ()
    items: tuple[Any, ...] = ()
    streams: bool = False
    """Whether the result can also be server-sent events, one JSON object each."""
    lines: bool = False
    """Whether the result can also be lines, one JSON object each."""


class Tool(msgspec.Struct, frozen=True):
    """An operation as models see it. Empty texts default to those of the operation."""

    name: str = ""
    title: str = ""
    description: str = ""
    destructive: bool = False
    """Whether it can destroy something."""
    idempotent: bool = False
    """Whether a repeated call has no further effect."""
    body: type[msgspec.Struct] | None = None
    """The body type of the tool, for an operation with several."""
    only: Mapping[str, str] = {}
    """Arguments that select from a list, each with the member that has to be equal. No object with a `name` that was
    asked for is an error."""
    last_first: bool = False
    """Whether the tool reverses a list, so that its last objects are not those that are left out."""


class Recorded(Enum):
    """The records of an operation in the audit log (docs/explanation/audit.md)."""

    NOT = "not"
    """No record: it only reads data of the daemon."""
    CHANGE = "change"
    ACCESS = "access"
    """A record for access to a guest."""


class Operation(msgspec.Struct, frozen=True, eq=False, kw_only=True, dict=True):
    """One method of one path."""

    method: str
    path: str
    name: str
    """The unique name, which is `operationId` in the OpenAPI document."""
    permission: Permission
    summary: str
    details: str = ""
    answers: Mapping[int | Literal["default"], Answer]
    body: Any = None
    """The type of the body. A body of type `Nothing` may be left out."""
    body_media: str | None = None
    """The only content type accepted; the body is then required."""
    body_optional: bool = False
    examples: Mapping[str, JsonObject] = msgspec.field(default_factory=dict)
    """Example bodies, by title."""
    query: Mapping[str, QueryParameter] = msgspec.field(default_factory=dict)
    """The query parameters by their names in Python."""
    documented: tuple[Parameter, ...] = ()
    """Parameters of an operation that an adapter implements."""
    errors: tuple[int, ...] = ()
    """Error statuses besides those that follow from the other members."""
    credentials_in_query: bool = False
    """Whether browsers open it without headers."""
    call: Callable[..., Awaitable[Any]] | None = None
    """The function that implements it, `call(context, *path, **parameters)`; None if an adapter implements it."""
    idempotent: bool = False
    waits_for: Status | None = None
    """The status that the VM reaches afterwards; clients may wait for it."""
    if_match: bool = False
    registry_auth: bool = False
    """Whether the request may contain credentials for registries."""
    secret: bool = False
    """Whether the answer contains a secret, so that no cache may keep it."""
    journaled: bool = False
    """Whether its change is a transaction of the journal that includes the record, so that no earlier record is
    needed."""
    vm_in_query: bool = False
    """Whether the parameter `vm` names the VM that it concerns."""
    spans: bool = False
    """Whether, in a fleet, its result comes from all hosts together."""
    only_reads: bool = False
    """Whether it needs more than `view` but still only reads data of the daemon, so that it has no record."""
    each_minute: bool = False
    """Whether one record a minute is enough for each caller and place, as calls are frequent."""
    tools: tuple[Tool, ...] = ()
    client: str | None = None
    """The client's method: `vms.pause`."""
    client_timeout_s: float | None = None
    """How long the client waits for the answer; None for the client's default."""

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names in the path."""
        return _path_names(self.path)

    @cached_property
    def recorded(self) -> Recorded:
        """The records in the audit log, which follow from the permission."""
        if self.only_reads or self.permission in (Permission.PUBLIC, Permission.VIEW):
            return Recorded.NOT
        if self.permission is Permission.USE:
            return Recorded.ACCESS
        return Recorded.NOT if self.permission is Permission.ADMIN and self.method == "GET" else Recorded.CHANGE

    @cached_property
    def status(self) -> int:
        """The success status code."""
        (status, *_) = self.answers
        assert isinstance(status, int)
        return status

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """The defaults of the query parameters."""
        assert self.call is not None
        signature = inspect.signature(self.call).parameters
        return {name: signature[name].default for name in self.query}

    @property
    def has_etag(self) -> bool:
        return any("ETag" in answer.headers for answer in self.answers.values())

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters of the query and of headers, as the OpenAPI document shows them."""
        shown = []
        if self.waits_for is not None:
            shown += [_described("wait", WAIT), _described("timeout", TIMEOUT)]
        shown += [_described(name, parameter) for name, parameter in self.query.items()]
        shown += self.documented
        if self.if_match:
            shown.append(_IF_MATCH)
        if self.registry_auth:
            shown.append(_REGISTRY_AUTH)
        if self.call is not None and self.method == "GET" and self.has_etag:
            shown.append(_IF_NONE_MATCH)
        if self.idempotent:
            shown.append(_IDEMPOTENCY_KEY)
        return tuple(shown)


class Table:
    """Operations in the order in which documents show them."""

    def __init__(self, operations: Sequence[Operation] = ()) -> None:
        self._operations: dict[str, Operation] = {}
        self._routes: dict[str, Any] = {}
        for operation in operations:
            self.add(operation)

    def __iter__(self) -> Iterator[Operation]:
        return iter(self._operations.values())

    def __getitem__(self, name: str) -> Operation:
        return self._operations[name]

    def find(self, method: str, path: str) -> Operation | None:
        """Returns the operation of a request. No name is empty."""
        node, rest = self._routes, None
        for part in path.split("/"):
            rest = node.get(_REST, rest)
            following = node.get(part) or (node.get(_ANY_PART) if part else None)
            if following is None:
                node = {}
                break
            node = following
        key = _end(method)
        found: Operation | None = node.get(key) or (rest or {}).get(key)
        return found

    def copy(self) -> Table:
        """Returns a copy to which operations can be added."""
        return Table(tuple(self))

    def add(self, operation: Operation) -> Operation:
        """Adds an operation. :raises ValueError: its name is in use."""
        if operation.name in self._operations:
            raise ValueError(f"there are two operations named {operation.name!r}")
        self._operations[operation.name] = operation
        node = self._routes
        for part in operation.path.split("/"):
            key = _REST if part == "{path}" else _ANY_PART if part.startswith("{") else part
            node = node.setdefault(key, {})
        node[_end(operation.method)] = operation
        return operation

    def declare(self, route: str, name: str, permission: Permission, summary: str, **more: Any) -> Operation:
        """Adds an operation that an adapter implements. `route` is a method and a path; `more` are members of
        `Operation`."""
        method, path = route.split(" ")
        return self.add(Operation(method=method, path=path, name=name, permission=permission, summary=summary, **more))

    def operation(
        self,
        route: str,
        *,
        permission: Permission,
        answer: str,
        status: int | None = None,
        headers: tuple[str, ...] = (),
        errors: tuple[int, ...] = (),
        idempotent: bool = False,
        waits_for: Status | None = None,
        if_match: bool = False,
        registry_auth: bool = False,
        secret: bool = False,
        journaled: bool = False,
        spans: Spans[Any] | None = None,
        examples: Mapping[str, JsonObject] | None = None,
        tool: Tool | tuple[Tool, ...] | bool = False,
        client: str | None = None,
        client_timeout_s: float | None = None,
    ) -> Callable[[F], F]:
        """Adds the decorated function, which takes a `Context`, the names in the path, perhaps `body`, and parameters.

        Its name is the operation's name, its docstring the summary and the details, and its annotations the rest.

        :param route: a method and a path
        :param answer: the content of a successful response
        :param status: the success status; default 200, or 204 for a function that returns None
        :param spans: how a fleet joins the results of all hosts; None for the result of one host
        :param examples: example bodies, by title
        :param tool: how models see it; True for its own texts
        :param client: the client's method, if it does not follow from the name
        :raises ValueError: the function does not fit the declaration
        """
        method, path = route.split(" ")

        def add(function: F) -> F:
            hints = get_type_hints(function, include_extras=True)
            gives = hints["return"]
            tools = tool if isinstance(tool, tuple) else (tool,) if isinstance(tool, Tool) else (Tool(),) * tool
            body = _body_of(hints, method)
            for wrong, why in (
                (
                    _path_names(path) != _positional(function)[1:],
                    "its arguments after the context are not what the path names, in that order",
                ),
                (
                    idempotent and gives not in get_args(Result),
                    f"the journal keeps no {gives} to answer with again: add it to `volant.journal.Result`",
                ),
                (
                    waits_for is not None and gives not in (VmCreated, VmChanged, VmForked, VmView),
                    f"`waits_for` needs a VM, and {gives} is none",
                ),
                (
                    isinstance(body, OneOf) and any(each.body not in body.types for each in tools),
                    "a tool takes one body: name it in `Tool(body=…)`",
                ),
            ):
                if wrong:
                    raise ValueError(f"{route} ({function.__name__}): {why}")
            of = view_type(gives)
            shown = (
                *headers,
                *(("Location",) if has_location(gives) else ()),
                *(("ETag",) if has_etag(gives) else ()),
                *(("Volant-Wait",) if waits_for is not None else ()),
                *(("Volant-Missing-Hosts",) if spans is not None else ()),
                *(("Idempotency-Replayed",) if idempotent else ()),
            )
            code = status or (204 if of is None else 200)
            answers: dict[int | Literal["default"], Answer] = {code: Answer(answer, of, headers=shown)}
            if method == "GET" and has_etag(gives):
                answers[304] = Answer("The client's copy is current", headers=("ETag",))
            summary, _, details = inspect.cleandoc(function.__doc__ or "").partition("\n\n")
            name = function.__name__
            query = {
                name: found
                for name, hint in hints.items()
                if get_origin(hint) is Annotated
                for found in get_args(hint)
                if isinstance(found, QueryParameter)
            }
            if spans is not None:
                function = cast(F, spanning(function, path, query, spans))
            self.add(
                Operation(
                    method=method,
                    path=path,
                    name=name,
                    permission=permission,
                    summary=" ".join(summary.split()).removesuffix("."),
                    details=" ".join(details.split()),
                    answers=answers,
                    body=body,
                    body_optional=inspect.signature(function).parameters.get("body", _REQUIRED).default
                    is not inspect.Parameter.empty,
                    examples=examples or {},
                    query=query,
                    errors=(*errors, *((409, 422) if idempotent else ()), *((412,) if if_match else ())),
                    call=function,
                    idempotent=idempotent,
                    waits_for=waits_for,
                    if_match=if_match,
                    registry_auth=registry_auth,
                    secret=secret,
                    journaled=journaled,
                    spans=spans is not None,
                    tools=tools,
                    client=client or _client_name(name, path),
                    client_timeout_s=client_timeout_s,
                )
            )
            return function

        return add


def _path_names(path: str) -> tuple[str, ...]:
    return tuple(re.findall(r"{(\w+)}", path))


def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)


_REQUIRED = inspect.Parameter("body", inspect.Parameter.KEYWORD_ONLY)


def _end(method: str) -> str:
    """Returns the key of an operation at the end of its path. It differs from all parts of paths, as it has a slash."""
    return f"/{'GET' if method == 'HEAD' else method}"


def _described(name: str, parameter: QueryParameter) -> Parameter:
    return Parameter(parameter.name or name, parameter.schema, parameter.help, parameter.repeated)


def _body_of(hints: Mapping[str, Any], method: str) -> Any:
    if "body" not in hints:
        return None if method == "GET" else Nothing
    body = hints["body"]
    return body if isinstance(body, type) else OneOf(get_args(body))


def _client_name(name: str, path: str) -> str:
    """Returns `vms.pause` for `pause_vm`: the resource, and the name without the resource."""
    resource = path.removeprefix("/api/v1/").split("/")[0]
    words = [word for word in name.split("_") if word not in (resource, resource.removesuffix("s"))]
    return f"{resource}.{'_'.join(words)}"


_ANY_PART = "{}"
_REST = "{path}"
"""The rest of a path, including slashes."""

TABLE = Table()
"""All operations of this daemon."""
