"""The syntax of names, durations, labels and text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated

import msgspec

from ._problem import invalid

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""Pattern for names of VMs and plugins (contract: Common)."""

MAX_LABELS = 64
MAX_TEXT = 4096

Name = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": NAME_PATTERN})]
"""The pattern is only for the schema; `check_name` has better errors."""

Duration = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": r"^[0-9]{1,12}(ms|s|m|h|d)$"})]
"""The pattern is only for the schema; `parse_duration` decides."""

_CONTROL_CLASS = r"\x00-\x1f\x7f"
PLAIN_PATTERN = rf"^[^{_CONTROL_CLASS}]*$"
"""Pattern for text of one line (`check_plain`)."""

Labels = Annotated[
    dict[
        Annotated[str, msgspec.Meta(extra_json_schema={"pattern": rf"^[^={_CONTROL_CLASS}]+$", "maxLength": 128})],
        Annotated[str, msgspec.Meta(extra_json_schema={"pattern": PLAIN_PATTERN, "maxLength": 1024})],
    ],
    msgspec.Meta(extra_json_schema={"maxProperties": MAX_LABELS}),
]
"""The patterns are only for the schema; `check_labels` has better errors."""

Plain = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": PLAIN_PATTERN, "maxLength": MAX_TEXT})]
"""The pattern is only for the schema; `check_plain` decides."""

Time = Annotated[datetime, msgspec.Meta(tz=True)]
"""A time with a zone, RFC 3339 in JSON."""

_NAME = re.compile(NAME_PATTERN.rstrip("$") + r"\Z")
_DURATION = re.compile(r"([0-9]{1,12})(ms|s|m|h|d)\Z")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_CONTROL = re.compile(f"[{_CONTROL_CLASS}]")


def check_name(value: str, field: str) -> str:
    """Returns `value` if it is a name. :raises Problem: 400."""
    if not _NAME.match(value):
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise invalid(
            field,
            f"{field} {shown!r} is not a name: 1 to 63 lower-case letters, digits and inner hyphens",
            hint=f"a name matches {NAME_PATTERN}",
        )
    return value


def is_name(value: str) -> bool:
    """Returns whether `value` is a valid name."""
    return _NAME.match(value) is not None


def parse_duration(value: str, field: str, *, minimum_s: float = 0.0, maximum_s: float = float("inf")) -> float:
    """Returns the seconds of a duration such as `500ms`, `10s`, `2m`, `1h`, `7d`. :raises Problem: 400."""
    match = _DURATION.match(value)
    if match is None:
        raise invalid(field, f"{field} {value[:40]!r} is not a duration", hint="write for instance 500ms, 10s, 2m, 1h")
    seconds = int(match[1]) * _UNIT_S[match[2]]
    if not minimum_s <= seconds <= maximum_s:
        raise invalid(field, f"{field} {value} is outside {format_duration(minimum_s)} to {format_duration(maximum_s)}")
    return seconds


def format_duration(seconds: float) -> str:
    """Returns the shortest exact text of a duration, for `parse_duration`."""
    if seconds == float("inf"):
        return "any length"
    if seconds != int(seconds):
        return f"{round(seconds * 1000)}ms"
    for unit in ("d", "h", "m"):
        if seconds and seconds % _UNIT_S[unit] == 0:
            return f"{int(seconds // _UNIT_S[unit])}{unit}"
    return f"{int(seconds)}s"


def check_plain(value: str, field: str, *, maximum: int = MAX_TEXT) -> str:
    """Returns `value` if it has no control characters and is not too long. :raises Problem: 400."""
    if len(value) > maximum:
        raise invalid(field, f"{field} has {len(value)} characters, at most {maximum} are allowed")
    if _CONTROL.search(value):
        raise invalid(field, f"{field} has control characters")
    return value


def check_labels(labels: Mapping[str, str], field: str = "labels") -> None:
    """Checks labels. :raises Problem: 400, there are too many, or one can't be written as `key=value`."""
    if len(labels) > MAX_LABELS:
        raise invalid(field, f"{field} has {len(labels)} members, at most {MAX_LABELS} are allowed")
    for key, value in labels.items():
        if not key or "=" in key:
            raise invalid(field, f"{field} has the key {key[:80]!r}: not empty and without '='")
        check_plain(key, field, maximum=128)
        check_plain(value, f"{field}.{key}", maximum=1024)


def utf8_boundary(data: bytes | bytearray, cut: int, begin: int = 0) -> int:
    """Returns the last position in `data` from `begin` to `cut` that does not split a UTF-8 character, or `cut`."""
    for back in range(4):
        if cut - back > begin and data[cut - back] & 0xC0 != 0x80:
            return cut - back
    return cut


def first_few(names: Sequence[str]) -> str:
    """Returns up to five names and the number of the others, for a sentence."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
