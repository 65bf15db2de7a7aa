"""Takes out of texts and documents what may be a secret, before they leave the host.

Two nets. What is known to be one goes wherever it stands: the API keys that can be read here. And what looks like one
goes by where it stands: credentials in headers and URLs, queries, values under telling names. From documents of ours
whole members go, as nobody knows what people write into them: values of labels, environments, kernel command lines,
consoles. It takes rather too much than too little.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

REMOVED = "[removed]"

_MEMBERS = frozenset({"labels", "env", "kernel_cmdline", "console", "command", "cmdline"})
_TELLING = r"(?:key|token|secret|passw(?:or)?d|passphrase|ticket|credential|authorization|cookie)"
# Everything is bounded and begins with something rare, as a text must not take the square of its length.
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [^-]{1,40}-----.*?(?:-----END [^-]{1,40}-----|\Z)", re.S), REMOVED),
    # A header has the rest of its line.
    (re.compile(r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|x-volant-api-key)(['\"]?\s{0,9}:\s{0,9})[^\r\n]+"),
     rf"\1\2{REMOVED}"),
    (re.compile(r"(?i)\b(bearer|basic)\s{1,9}[\w.~+/=-]{6,}"), rf"\1 {REMOVED}"),
    (re.compile(r"://[^/\s@'\"]{1,1000}@"), f"://{REMOVED}@"),
    (re.compile(r"\?[\w.%~-]{1,200}=[^\s'\"<>)\]]*"), f"?{REMOVED}"),
    (re.compile(rf"(?i)(--[\w-]{{0,40}}{_TELLING}[\w-]{{0,40}})\s{{1,9}}[^\s-]\S*"), rf"\1 {REMOVED}"),
    (re.compile(rf"(?i)({_TELLING}[\w-]{{0,64}}['\"]?\s{{0,9}}[=:]\s{{0,9}})(\"[^\"\r\n]*\"|'[^'\r\n]*'|\S+)"),
     rf"\1{REMOVED}"),
)  # fmt: skip
_TELLING_NAME = re.compile(_TELLING, re.I)
_SHORTEST = 4
"""A shorter secret would take half of every text with it."""


class Scrub:
    """Knows some secrets, and how others look."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # The longest first, as one may be the beginning of another.
        self._secrets = sorted({secret for secret in secrets if len(secret) >= _SHORTEST}, key=len, reverse=True)

    def text(self, text: str) -> str:
        """`text` without them."""
        for secret in self._secrets:
            text = text.replace(secret, REMOVED)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text

    def document(self, value: Any) -> Any:
        """A JSON document without them; it stays one."""
        match value:
            case str():
                return self.text(value)
            case Mapping():
                return {key: self._member(key, member) for key, member in value.items()}
            case list() | tuple():
                return [self.document(member) for member in value]
            case _:
                return value

    def _member(self, key: str, value: Any) -> Any:
        if key in _MEMBERS and value:
            return dict.fromkeys(value, REMOVED) if isinstance(value, Mapping) else REMOVED
        return REMOVED if isinstance(value, str) and value and _is_telling(key) else self.document(value)


def _is_telling(name: str) -> bool:
    """Whether a name says that its value is a secret. A path to one is none."""
    return bool(_TELLING_NAME.search(name)) and not name.lower().endswith(("_file", "_path", "_dir"))
