"""Checks of the JSON in requests. Each returns the checked value, and raises Problem 400 with the field's name."""

from __future__ import annotations

from volant.model.agent import MAX_USER_CHARACTERS, signal_number

from ._http import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MAX_ITEMS = 4096


def decode_json(body: bytes, fields: set[str]) -> dict[str, Any]:
    """Returns the JSON object of a body that has no fields but `fields`."""
    import json

    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not JSON") from None
    return check_object(value, fields, "the body")


def check_object(value: object, fields: set[str], what: str, prefix: str = "") -> dict[str, Any]:
    """Returns an object that has no fields but `fields`; `prefix` stands before their names in errors."""
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
    """Returns a user as `_root.account` takes it, or None if there is none."""
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
