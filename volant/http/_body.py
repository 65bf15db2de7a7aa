"""JSON bodies: strict, bounded, and with errors that name the field."""

from __future__ import annotations

import re
from typing import Any, Protocol, TypeVar

import msgspec
import trio

from volant.model import Problem, invalid

from ._call import Call
from ._problems import not_json, too_large
from ._settings import Limits

JSON = "application/json"

T = TypeVar("T")

_MEMBER = re.compile(r"`\$(?P<path>(?:\.[A-Za-z_]\w*|\[\d+\])*)\[\.\.\.\]")
_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[(\d+)\]")
_AT = re.compile(r"(?P<what>.*) - at `(?P<where>[^`]*)`\Z", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`\Z", re.DOTALL)
BODY_S = 30
"""Deadline for a body that is held in memory."""
_SILENCE_S = 60.0
"""Maximum pause within an upload."""
_GRACE_S, _LEAST_RATE = 300.0, 32 * 1024
"""An upload may take `_GRACE_S` and the time that its bytes take at `_LEAST_RATE` bytes per second: for 320 MiB,
300 + 10,240 s. Few uploads are accepted at once, and a slow one would block others."""


class Nothing(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The body of a command: an empty object, or no body."""


async def read_call_body(call: Call, kind: type[T], limits: Limits) -> T:
    """Decodes the body of a request. :raises Problem: see `decode_body` and `read_call_bytes`."""
    data = await read_call_bytes(call, limits)
    return decode_body(data, (call.header(b"content-type") or "").partition(";")[0].strip().lower(), kind)


class Upload(Protocol):
    """Receives the bytes of a large body in pieces."""

    def expect(self, length: int) -> None:
        """Announces the number of bytes. Raises if there is no room for them."""

    async def write(self, data: bytes) -> None:
        """Writes the next bytes."""


async def receive_into(call: Call, upload: Upload) -> None:
    """Passes on the body of a request as it arrives. Memory never holds more than one piece of it.

    :raises Problem: 408, nothing arrives for 60 s, or less than 32 KiB/s on average besides the first 5 minutes
    :raises trio.BrokenResourceError: the client disconnected
    """
    length = call.header(b"content-length")
    if length is not None:
        upload.expect(int(length))
    more = True
    left_s = _GRACE_S
    while more:
        began = trio.current_time()
        with trio.move_on_after(min(_SILENCE_S, left_s)) as scope:
            message = await call.receive()
        left_s -= trio.current_time() - began
        if scope.cancelled_caught:
            slow = f"the body arrived at less than {_LEAST_RATE} bytes per second"
            raise Problem(
                408, "request-timeout", slow if left_s <= 0 else f"no data of the body arrived for {_SILENCE_S:g} s"
            )
        if message["type"] == "http.disconnect":
            raise trio.BrokenResourceError("the client left")
        if message["body"]:
            await upload.write(message["body"])
        left_s += len(message["body"]) / _LEAST_RATE
        more = message["more_body"]


async def read_call_bytes(call: Call, limits: Limits) -> bytes:
    """Returns the whole body as bytes. :raises Problem: 408, 413, 503; `trio.BrokenResourceError`: the client
    disconnected."""
    length = call.header(b"content-length")
    if length is not None and int(length) > limits.json_body:
        raise too_large(limits.json_body)
    data = bytearray()
    with trio.move_on_after(BODY_S) as scope:
        more = True
        while more:
            message = await call.receive_counted()
            if message["type"] == "http.disconnect":
                raise trio.BrokenResourceError("the client left")
            data += message["body"]
            if len(data) > limits.json_body:
                raise too_large(limits.json_body)
            more = message["more_body"]
    if scope.cancelled_caught:
        raise Problem(408, "request-timeout", f"the body did not arrive within {BODY_S} s")
    return bytes(data)


def decode_body(data: bytes, content_type: str, kind: type[T]) -> T:
    """Decodes a body. :raises Problem: 400, not JSON, or not of this type; 415, another content type."""
    if not data:
        if kind is Nothing:
            return kind()
        raise Problem(400, "invalid-request", "the request has no body", hint="send a JSON object")
    if content_type and content_type != JSON and not content_type.endswith("+json"):
        raise not_json(content_type)
    return decode(data, kind)


def decode(data: bytes, kind: type[T], what: str = "the body") -> T:
    """Decodes JSON. :raises Problem: 400 that names the field."""
    try:
        return _decoder(kind).decode(data)
    except msgspec.ValidationError as error:
        raise _problem(_with_member(str(error), data, kind), what) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(400, "invalid-json", f"{what} is not valid JSON: {error}") from None
    except RecursionError:
        raise Problem(400, "invalid-json", f"{what} is nested too deeply") from None


def _with_member(text: str, data: bytes, kind: type[Any]) -> str:
    """Returns the text of a ValidationError about `data`, with the name of the member in place of its first `[...]`.

    msgspec does not reveal the name, so it is found by bisection: a dictionary of n members takes log n conversions.
    """
    found = _MEMBER.search(text)
    if found is None:
        return text
    try:
        root = msgspec.json.decode(data)
        parent, key = None, None
        inner = root
        for name, index in _STEP.findall(found["path"]):
            parent, key = inner, name or int(index)
            inner = inner[key]
        if parent is None or not isinstance(inner, dict):
            return text
        members = list(inner.items())
        while len(members) > 1:
            half = members[: len(members) // 2]
            parent[key] = dict(half)
            members = half if _error(root, kind) == text else members[len(half) :]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        return text
    name = members[0][0][:80].replace("`", "'")
    return f"{text[: found.end() - len('[...]')]}.{name}{text[found.end() :]}"


def _error(value: object, kind: type[Any]) -> str:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    return decoder


_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {}


def _problem(text: str, body: str) -> Problem:
    """Converts a message of msgspec to a problem, such as "Expected `int`, got `str` - at `$.cpu_cores`"."""
    at = _AT.match(text)
    what, where = (at["what"], at["where"].removeprefix("$").removeprefix(".")) if at else (text, "")
    for pattern, words in ((_UNKNOWN, "there is no field"), (_MISSING, f"{body} lacks the field")):
        found = pattern.match(what)
        if found:
            name = found["name"][:80]
            field = f"{where}.{name}" if where else name
            return invalid(field, f"{words} {field!r}")
    what = what.replace("`", "")
    if not where:
        return Problem(400, "invalid-request", f"{body}: {_lower(what)}")
    return invalid(where[:200], f"{where[:200]}: {_lower(what)}")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
