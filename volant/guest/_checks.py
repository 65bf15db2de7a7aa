"""Strict checks of requests: of their JSON, and of queries and percent-encoding. Ambiguous input is refused."""

from __future__ import annotations

from volant.model.agent import MAX_USER_CHARACTERS, signal_number

from ._http import Problem

# Strict parsing of queries and percent-encoding: everything ambiguous is refused.
#
# Not with `urllib.parse`, which is slow to import, accepts malformed text and replaces what it can't decode.


_HEX = b"0123456789abcdefABCDEF"


def unquote(text: str, what: str) -> bytes:
    """Decodes percent-encoding.

    :param what: the name of the text in errors
    :raises Problem: 400, the text is malformed or has a NUL
    """
    data = text.encode()
    out = bytearray()
    at = 0
    while (percent := data.find(b"%", at)) >= 0:
        digits = data[percent + 1 : percent + 3]
        if len(digits) != 2 or digits.translate(None, _HEX):
            raise Problem(400, f"{what} has a % that is not followed by two hexadecimal digits")
        out += data[at:percent]
        out.append(int(digits, 16))
        at = percent + 3
    out += data[at:]
    if 0 in out:
        raise Problem(400, f"{what} has a NUL")
    return bytes(out)


def parse_query(query: str, allowed: set[str]) -> dict[str, str]:
    """Returns parameters by name. :raises Problem: 400, a parameter is unknown, malformed or repeated."""
    found: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, value = part.partition("=")
        try:
            key = unquote(name, "the query").decode()
            text = unquote(value.replace("+", " "), "the query").decode()
        except UnicodeDecodeError:
            raise Problem(400, "the query is not UTF-8") from None
        if key not in allowed:
            raise Problem(400, f"unknown parameter {key[:80]!r}", field=key[:80])
        if key in found:
            raise Problem(400, f"the parameter {key!r} is given twice", field=key)
        found[key] = text
    return found


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MAX_ITEMS = 4096


def decode_json(body: bytes, fields: set[str]) -> dict[str, Any]:
    """Returns the JSON object of a body that only has the members `fields`."""
    import json

    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not JSON") from None
    return check_object(value, fields, "the body")


def check_object(value: object, fields: set[str], what: str, prefix: str = "") -> dict[str, Any]:
    """Returns an object that only has the members `fields`; `prefix` precedes their names in errors."""
    if not isinstance(value, dict):
        raise Problem(400, f"{what} is not a JSON object", field=prefix.removesuffix("."))
    for name in value:
        if name not in fields:
            raise Problem(400, f"unknown field {prefix + name[:80]!r}", field=prefix + name[:80])
    return value


def check_strings(value: object, field: str, *, empty: bool = False) -> list[str]:
    """Returns a list of at most 4096 arguments of a program."""
    if not isinstance(value, list) or len(value) > _MAX_ITEMS or not (value or empty):
        raise Problem(400, f"{field} is not a list of 1 to {_MAX_ITEMS} texts", field=field)
    for item in value:
        if not isinstance(item, str) or "\0" in item:
            raise Problem(400, f"{field} has an item that is not a text without NUL", field=field)
    return value


def check_environment(value: object, field: str) -> dict[str, str]:
    """Returns at most 4096 environment variables by name."""
    if not isinstance(value, dict) or len(value) > _MAX_ITEMS:
        raise Problem(400, f"{field} is not an object of at most {_MAX_ITEMS} texts", field=field)
    for name, text in value.items():
        if not name or "=" in name or "\0" in name or not isinstance(text, str) or "\0" in text:
            raise Problem(400, f"{field} has a variable that can't be set: {name[:80]!r}", field=field)
    return value


def check_directory(value: object, field: str) -> str:
    """Returns an absolute path."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise Problem(400, f"{field} is not an absolute path", field=field)
    return value


def check_user(value: object, field: str) -> str | None:
    """Returns a user in the form of `_root.account`, or None if there is none."""
    if value is not None and (
        not isinstance(value, str) or not value or "\0" in value or len(value) > MAX_USER_CHARACTERS
    ):
        raise Problem(400, f"{field} is not a name or number", field=field)
    return value


def check_signal(value: object, field: str) -> int:
    """Returns the number of a signal."""
    number = signal_number(value) if isinstance(value, str) else None
    if number is None:
        raise Problem(400, f"{field} is not the name or number of a signal", field=field)
    return number


def check_number(value: object, field: str, low: float, high: float) -> float:
    """Returns a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Problem(400, f"{field} is not a number from {low:g} to {high:g}", field=field)
    return float(value)


def check_integer(value: object, field: str, low: int, high: int) -> int:
    """Returns a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Problem(400, f"{field} is not a whole number from {low} to {high}", field=field)
    return value


def check_flag(value: object, field: str) -> bool:
    """Returns true or false."""
    if not isinstance(value, bool):
        raise Problem(400, f"{field} is neither true nor false", field=field)
    return value


def check_port(value: object, field: str) -> int | None:
    """Returns a TCP port, or None if there is none."""
    return None if value is None else int(check_number(value, field, 1, 65535))


def check_base64(value: object, field: str) -> bytes:
    """Returns the bytes of a base64 text."""
    import binascii

    try:
        if not isinstance(value, str):
            raise ValueError
        return binascii.a2b_base64(value.encode("ascii"), strict_mode=True)
    except ValueError:
        raise Problem(400, f"{field} is not base64", field=field) from None
