"""Removes possible secrets from texts and documents, before they leave the host.

It removes known secrets everywhere: the API keys that can be read here. It removes likely secrets by their context:
credentials in headers and URLs, queries, values under names such as `token`. From our own documents it removes whole
members that may contain anything: values of labels, environments, kernel command lines, consoles. In doubt it removes
too much.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

REMOVED = "[removed]"

_MEMBERS = frozenset({"labels", "env", "kernel_cmdline", "console", "command", "cmdline"})
_SENSITIVE = r"(?:key|token|secret|passw(?:or)?d|passphrase|ticket|credential|authorization|cookie)"
# Every repetition is bounded and each pattern begins with something rare, so that matching takes linear time.
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [^-]{1,40}-----.*?(?:-----END [^-]{1,40}-----|\Z)", re.S), REMOVED),
    # The value of a header is the rest of its line.
    (re.compile(r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|x-volant-api-key|volant-registry-auth)(['\"]?\s{0,9}:\s{0,9})[^\r\n]+"),
     rf"\1\2{REMOVED}"),
    (re.compile(r"(?i)\b(bearer|basic)\s{1,9}[\w.~+/=-]{6,}"), rf"\1 {REMOVED}"),
    (re.compile(r"://[^/\s@'\"]{1,1000}@"), f"://{REMOVED}@"),
    (re.compile(r"\?[\w.%~-]{1,200}=[^\s'\"<>)\]]*"), f"?{REMOVED}"),
    (re.compile(rf"(?i)(--[\w-]{{0,40}}{_SENSITIVE}[\w-]{{0,40}})\s{{1,9}}[^\s-]\S*"), rf"\1 {REMOVED}"),
    (re.compile(rf"(?i)({_SENSITIVE}[\w-]{{0,64}}['\"]?\s{{0,9}}[=:]\s{{0,9}})(\"[^\"\r\n]*\"|'[^'\r\n]*'|\S+)"),
     rf"\1{REMOVED}"),
)  # fmt: skip
_SENSITIVE_NAME = re.compile(_SENSITIVE, re.I)
_SHORTEST = 4
"""Characters of the shortest known secret. A shorter one would match too much of every text."""


class Scrub:
    """Removes known secrets, and what looks like a secret."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # The longest first, as a secret may be the beginning of another.
        self._secrets = sorted({secret for secret in secrets if len(secret) >= _SHORTEST}, key=len, reverse=True)

    def text(self, text: str) -> str:
        """Returns `text` without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, REMOVED)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text

    def document(self, value: Any) -> Any:
        """Returns a JSON document without secrets."""
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
        return REMOVED if isinstance(value, str) and value and _is_sensitive(key) else self.document(value)


def _is_sensitive(name: str) -> bool:
    """Whether the name of a value shows that it is a secret. A path to a secret is none."""
    return bool(_SENSITIVE_NAME.search(name)) and not name.lower().endswith(("_file", "_path", "_dir"))
