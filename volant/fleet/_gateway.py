"""The JSON of etcd's gateway: keys and values are base64, 64-bit numbers are text, and zero or false values are left
out. (Measured with etcd 3.5.16.)"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Annotated

import msgspec

from ._interface import Change, Compare, Entry, Step

MAX_ANSWER = 8 * 1024 * 1024
"""Maximum size of one answer or of one line of a watch. A line of a watch has at most one transaction: by default
1.5 MiB, which is about 2.3 MiB in base64 and JSON. Larger pages of a read are requested again in smaller ones."""


def condition(compare: Compare) -> dict[str, str]:
    """Returns the JSON of a condition."""
    body = {"key": _encoded(compare.key), "target": compare.target.upper(), "result": "EQUAL"}
    if isinstance(compare.wanted, bytes):
        return body | {"value": b64encode(compare.wanted).decode("ascii")}
    return body | {f"{compare.target}_revision": str(compare.wanted)}


def operation(step: Step) -> dict[str, dict[str, str]]:
    """Returns the JSON of a step."""
    key = _encoded(step.key)
    if step.kind == "put":
        value = b64encode(step.value).decode("ascii")
        return {"request_put": {"key": key, "value": value, "lease": str(step.lease)}}
    return {"request_delete_range" if step.kind == "delete" else "request_range": {"key": key}}


def range_of(prefix: str, *, after: str = "") -> dict[str, str]:
    """Returns the range of all keys with a prefix that come after the key `after`."""
    first = after.encode() + b"\0" if after else prefix.encode()
    return {"key": b64encode(first).decode("ascii"), "range_end": b64encode(_next(prefix.encode())).decode("ascii")}


def _next(prefix: bytes) -> bytes:
    """Returns the first key after all keys with a prefix. Prefixes are UTF-8, so their last byte is never 255."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _encoded(key: str) -> str:
    return b64encode(key.encode()).decode("ascii")


class Header(msgspec.Struct, frozen=True):
    """The header of each answer."""

    revision: str = "0"


class RawEntry(msgspec.Struct, frozen=True):
    key: str
    value: str = ""
    create_revision: str = "0"
    mod_revision: str = "0"
    lease: str = "0"

    @property
    def entry(self) -> Entry:
        """Returns the entry. :raises ValueError: it is malformed."""
        return Entry(
            b64decode(self.key).decode(),
            b64decode(self.value),
            int(self.create_revision),
            int(self.mod_revision),
            int(self.lease),
        )


class Ranged(msgspec.Struct, frozen=True):
    """The answer to a read."""

    header: Header = Header()
    kvs: list[RawEntry] = []
    more: bool = False


class _StepAnswer(msgspec.Struct, frozen=True):
    response_range: Ranged | None = None


class Transacted(msgspec.Struct, frozen=True):
    """The answer to a transaction."""

    header: Header = Header()
    succeeded: bool = False
    responses: list[_StepAnswer] = []


class Granted(msgspec.Struct, frozen=True):
    """The answer to the grant or the renewal of a lease. An ended lease has no TTL."""

    header: Header = Header()
    id: str = msgspec.field(name="ID", default="0")
    ttl: str = msgspec.field(name="TTL", default="0")


class SignedIn(msgspec.Struct, frozen=True):
    token: Annotated[str, msgspec.Meta(min_length=1, max_length=16384, pattern=r"^[!-~]+\Z")]


class KeptAlive(msgspec.Struct, frozen=True):
    result: Granted | None = None
    error: Failure | None = None


class Failure(msgspec.Struct, frozen=True):
    """The body of an error."""

    code: int = 0
    """A gRPC code."""
    message: str = ""
    error: str = ""

    @property
    def text(self) -> str:
        return (self.message or self.error)[:500]


class _RawChange(msgspec.Struct, frozen=True):
    kv: RawEntry
    type: str = "PUT"


class _WatchResult(msgspec.Struct, frozen=True):
    header: Header = Header()
    canceled: bool = False
    cancel_reason: str = ""
    compact_revision: str = "0"
    events: list[_RawChange] = []


class _Watched(msgspec.Struct, frozen=True):
    result: _WatchResult = _WatchResult()
    error: Failure | None = None


class Line(msgspec.Struct, frozen=True):
    """A line of a watch."""

    revision: int
    changes: Sequence[Change]
    ended: str | None
    """Why etcd has ended the watch; None if it has not."""
    compacted: bool
    """Whether etcd has ended the watch because the requested changes have expired."""
    broken: str | None
    """The error that ends the stream, for example that the member has lost its leader; None if there is none."""


def read_line(content: bytes) -> Line:
    """Parses a line. :raises ValueError, msgspec.MsgspecError: it is malformed."""
    watched = msgspec.json.decode(content, type=_Watched)
    result = watched.result
    changes: list[Change] = []
    for event in result.events:
        entry = event.kv.entry
        changes.append(Change(entry.key, None if event.type == "DELETE" else entry, entry.modified))
    return Line(
        int(result.header.revision),
        changes,
        result.cancel_reason[:200] if result.canceled else None,
        int(result.compact_revision) > 0,
        None if watched.error is None else watched.error.text,
    )
