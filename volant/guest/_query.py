"""Strict parsing of queries and percent-encoding: everything ambiguous is refused.

Not with `urllib.parse`, which is slow to import, accepts malformed text and replaces what it can't decode.
"""

from __future__ import annotations

from ._http import Problem

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
