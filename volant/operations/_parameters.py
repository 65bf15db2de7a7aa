"""Kinds of query parameters: their parsing, their description, and their encoding by the client.

An operation names its parameters in its signature: `grace_s: Annotated[float, Seconds("How long …", 600)] = 10.0`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import GenericAlias
from typing import Annotated, Any, ClassVar, Literal, get_args

import msgspec

from volant.http import MAX_INTEGER, Query
from volant.model import Labels, Name

_DURATION = "^[0-9]{1,12}(ms|s|m|h|d)$"
TEN_MINUTES = (
    "^(0{0,6}([0-9]{1,5}|[1-5][0-9]{5}|600000)ms|0{0,9}([0-9]{1,2}|[1-5][0-9]{2}|600)s|0{0,10}([0-9]|10)m|0{1,12}[hd])$"
)
"""The pattern of durations up to ten minutes, for schemas."""
_PATTERNS = {600.0: TEN_MINUTES, math.inf: _DURATION}


class QueryParameter(msgspec.Struct, frozen=True, kw_only=True):
    """A query parameter. `name` is its name in the query, if that differs from the name in Python."""

    help: str
    name: str = ""

    repeated = False
    """Whether a parameter with several values is repeated for each."""
    client_type = "str | None"
    """Its type annotation in the client."""
    encoder: ClassVar[str | None] = None
    """The client's function that encodes a value as text."""

    @property
    def schema(self) -> Any:
        """The type of one value in the OpenAPI document."""
        return str

    @property
    def tool_type(self) -> Any:
        """The type of the argument of an MCP tool."""
        return self.schema

    def read(self, query: Query, name: str, default: Any) -> Any:
        """Returns the value in a query. :raises Problem: 400 that names the parameter."""
        text = query.text(name)
        return default if text is None else text

    def texts(self, value: Any) -> list[str]:
        """Returns the query texts that `read` parses as this value."""
        return [] if value is None else [str(value)]


class Text(QueryParameter, frozen=True, kw_only=True):
    """Text. `of` can be a narrower type, which the operation checks."""

    of: Any = str

    @property
    def schema(self) -> Any:
        return self.of


class Flag(QueryParameter, frozen=True, kw_only=True):
    """`true` or `false`."""

    client_type = "bool"
    encoder = "flag"

    @property
    def schema(self) -> Any:
        return bool

    def read(self, query: Query, name: str, default: Any) -> bool:
        return query.flag(name, default)

    def texts(self, value: bool) -> list[str]:
        return [str(value).lower()]


class Integer(QueryParameter, frozen=True, kw_only=True):
    """An integer in a range, bounds included."""

    minimum: int = 0
    maximum: int = MAX_INTEGER
    tool_maximum: int | None = None
    """The maximum for models, if it is lower."""

    client_type = "int | None"

    @property
    def schema(self) -> Any:
        return Annotated[int, msgspec.Meta(ge=self.minimum, le=self.maximum)]

    @property
    def tool_type(self) -> Any:
        return Annotated[int, msgspec.Meta(ge=self.minimum, le=self.tool_maximum or self.maximum)]

    def read(self, query: Query, name: str, default: Any) -> Any:
        value = query.integer(name, minimum=self.minimum, maximum=self.maximum)
        return default if value is None else value


class Seconds(QueryParameter, frozen=True, kw_only=True):
    """A duration as text, such as `10s`; seconds for the operation, the client and models."""

    maximum: float = 600.0

    client_type = "float | None"
    encoder = "duration"

    @property
    def schema(self) -> Any:
        return Annotated[str, msgspec.Meta(extra_json_schema={"pattern": _PATTERNS[self.maximum]})]

    @property
    def tool_type(self) -> Any:
        return Annotated[float, msgspec.Meta(ge=0, le=self.maximum)]

    def read(self, query: Query, name: str, default: Any) -> float:
        return query.duration(name, default, maximum_s=self.maximum)

    def texts(self, value: float) -> list[str]:
        return [f"{round(value * 1000)}ms"]


class Words(QueryParameter, frozen=True, kw_only=True):
    """Some words of a set, comma-separated or repeated. `of` is an enumeration, a `Literal`, or the words."""

    of: Any

    client_type = "Collection[str]"
    encoder = "words"

    @property
    def schema(self) -> Any:
        return Annotated[self.tool_type, msgspec.Meta(min_length=1)]

    @property
    def tool_type(self) -> Any:
        words = Literal[self.of] if isinstance(self.of, tuple) else self.of
        return GenericAlias(list, words)

    @property
    def allowed(self) -> frozenset[str]:
        return frozenset(str(word) for word in get_args(self.of) or self.of)

    def read(self, query: Query, name: str, default: Collection[str]) -> Collection[str]:
        return query.words(name, self.allowed) or default

    def texts(self, value: Collection[str]) -> list[str]:
        return [",".join(map(str, value))] if value else []


class Names(QueryParameter, frozen=True, kw_only=True):
    """Names, each in a parameter of its own."""

    repeated = True
    client_type = "str | Sequence[str] | None"

    @property
    def schema(self) -> Any:
        return Name

    @property
    def tool_type(self) -> Any:
        return Name | None

    def read(self, query: Query, name: str, default: Collection[str]) -> Collection[str]:
        return query.names(name) or default

    def texts(self, value: Collection[str]) -> list[str]:
        return list(value)


class LabelPairs(QueryParameter, frozen=True, kw_only=True):
    """`key=value` pairs, each in a parameter of its own."""

    repeated = True
    client_type = "Mapping[str, str] | None"
    encoder = "pairs"

    @property
    def schema(self) -> Any:
        return Annotated[str, msgspec.Meta(pattern="^[^=]+=")]

    @property
    def tool_type(self) -> Any:
        return Labels

    def read(self, query: Query, name: str, default: Any) -> dict[str, str]:
        return query.labels(name)

    def texts(self, value: Mapping[str, str]) -> list[str]:
        return [f"{key}={text}" for key, text in value.items()]


class Parameter(msgspec.Struct, frozen=True):
    """A parameter as the OpenAPI document shows it."""

    name: str
    schema: Any
    help: str
    repeated: bool = False
    place: Literal["query", "header"] = "query"
