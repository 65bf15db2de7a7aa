"""Query parameters. A route reads each by its name, and an unread parameter is an error that names it."""

from __future__ import annotations

import re
from datetime import datetime
from urllib.parse import parse_qsl

from volant.model import Problem, invalid, is_name, parse_duration

MAX_INTEGER = 10**18 - 1
"""The maximum of a parameter."""

_MAX_FIELDS = 100
_INTEGER = re.compile(r"[0-9]{1,18}\Z")


class Query:
    """The parameters of one request. Read all that the route accepts, then call `done()`.

    With `credentials`, `api_key` and `ticket` are allowed: access control reads them, as browsers can't set headers.

    :raises Problem: 400, the query string is malformed.
    """

    def __init__(self, raw: bytes, *, credentials: bool = False) -> None:
        self._values: dict[str, list[str]] = {}
        self._known: set[str] = {"api_key", "ticket"} if credentials else set()
        if not raw:
            return
        try:
            pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
        except ValueError:
            raise Problem(
                400, "invalid-request", f"the query is not UTF-8, or has more than {_MAX_FIELDS} parameters"
            ) from None
        for name, value in pairs:
            self._values.setdefault(name, []).append(value)

    def all(self, name: str) -> list[str]:
        """Returns every value of a parameter that may be repeated."""
        self._known.add(name)
        return self._values.get(name, [])

    def names(self, name: str) -> list[str]:
        """Returns every value like `all`. :raises Problem: 400, one can't be the name of a VM or a plugin."""
        for value in (values := self.all(name)):
            if not is_name(value):
                raise invalid(name, f"the parameter {name} is {value[:80]!r}, not a name")
        return values

    def text(self, name: str) -> str | None:
        """Returns the value. :raises Problem: 400, it is given more than once."""
        values = self.all(name)
        if len(values) > 1:
            raise invalid(name, f"the parameter {name} is given {len(values)} times")
        return values[0] if values else None

    def integer(self, name: str, *, minimum: int = 0, maximum: int = MAX_INTEGER) -> int | None:
        """Returns the value as an integer. :raises Problem: 400, it is not an integer in the range."""
        text = self.text(name)
        if text is None:
            return None
        if not _INTEGER.match(text) or not minimum <= int(text) <= maximum:
            raise invalid(name, f"the parameter {name} is {text[:40]!r}, not an integer from {minimum} to {maximum}")
        return int(text)

    def flag(self, name: str, default: bool) -> bool:
        """Returns the value as a flag. :raises Problem: 400, it is neither `true` nor `false`."""
        text = self.text(name)
        if text is None:
            return default
        if text in ("true", "1", ""):
            return True
        if text in ("false", "0"):
            return False
        raise invalid(name, f"the parameter {name} is {text[:40]!r}, neither true nor false")

    def duration(self, name: str, default_s: float, *, maximum_s: float) -> float:
        """Returns the value in seconds. :raises Problem: 400, it is not a duration, or too long."""
        text = self.text(name)
        return default_s if text is None else parse_duration(text, name, maximum_s=maximum_s)

    def words(self, name: str, allowed: frozenset[str]) -> frozenset[str]:
        """Returns comma-separated or repeated words; empty if there are none. :raises Problem: 400, for another
        word."""
        given = [word for text in self.all(name) for word in text.split(",")]
        for word in given:
            if word not in allowed:
                raise invalid(
                    name, f"the parameter {name} has {word[:40]!r}", hint=f"there are {', '.join(sorted(allowed))}"
                )
        return frozenset(given)

    def labels(self, name: str = "label") -> dict[str, str]:
        """Returns labels, each as `key=value`, which may be repeated. :raises Problem: 400, one is malformed."""
        labels = {}
        for text in self.all(name):
            key, equals, value = text.partition("=")
            if not key or not equals:
                raise invalid(name, f"the parameter {name} is {text[:80]!r}, not key=value")
            labels[key] = value
        return labels

    def done(self) -> None:
        """Checks that all parameters were read. :raises Problem: 400 that names a parameter which the route does not
        accept."""
        for name in self._values:
            if name not in self._known:
                known = sorted(self._known - {"api_key", "ticket"})
                raise invalid(
                    name[:80],
                    f"there is no parameter {name[:80]!r} here",
                    hint=f"there are {', '.join(known)}" if known else "this route takes none",
                )


def parse_time(text: str, field: str) -> datetime:
    """Returns an RFC 3339 time. :raises Problem: 400."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise invalid(field, f"{field} {text[:40]!r} is not a time", hint="write for instance 2025-09-24T12:34:56Z")
    return time
