"""Parses the settings for access control: API keys, networks and origins.

An invalid value is an error: a daemon must not run without a protection that the operator configured.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from volant.http import Network, parse_network


class UnreadableFile(Exception):
    """A file can't be used. The text has the reason, and follows the name of the file."""


def read_given(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file. :raises UnreadableFile: it can't be read, is not a regular file, or is
    larger."""
    try:
        # Non-blocking, because opening a pipe without a writer would block forever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableFile("is not a regular file")
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UnreadableFile(f"can't be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise UnreadableFile(f"is larger than {max_bytes} bytes")
    return data


_MAX_FILE = 64 * 1024
_MAX_KEYS = 100
_KEY = re.compile(r"[\x21-\x7e]{16,1000}\Z")
"""Sixteen random hexadecimal characters are 64 bits, which can't be guessed over a network."""
_CLIENT_SECRET = re.compile(r"[\x20-\x7e]{1,1000}\Z")


class ProtectionError(Exception):
    """A setting for access control is invalid. The text names it, and never contains a key."""


class Secret:
    """A text that `repr` and `str` do not show."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Returns the text."""
        return self._value

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret(…)"


class Protection(msgspec.Struct, frozen=True):
    """The access control of the API."""

    keys: tuple[Secret, ...] = ()
    allow_cidr: tuple[Network, ...] = ()
    trusted_proxies: tuple[Network, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_any(self) -> bool:
        """Whether there is any access control."""
        return bool(self.keys or self.allow_cidr)


def protection(
    *, api_key: Secret | None, api_key_file: Path | None, allow_cidr: list[str], trusted_proxies: list[str]
) -> Protection:
    """Reads the key file and parses the lists. :raises ProtectionError: one is invalid."""
    warnings: list[str] = []
    keys: list[str] = []
    if api_key is not None:
        keys.append(_checked(api_key.reveal(), "api_key"))
    if api_key_file is not None:
        keys += _read_keys(api_key_file, warnings)
    return Protection(
        tuple(Secret(key) for key in dict.fromkeys(keys)),
        _networks("api_allow_cidr", allow_cidr),
        _networks("trusted_proxies", trusted_proxies),
        tuple(warnings),
    )


def check_origin(origin: str) -> None:
    """Checks an origin. :raises ProtectionError: it can't be trusted."""
    if origin == "null":
        raise ProtectionError("cors_origins has 'null', which is the origin of every sandboxed page, a guest's too")
    try:
        parts = urlsplit(origin)
        _ = parts.port
        more = parts.query or parts.fragment or parts.username or parts.path.strip("/") or "*" in origin
        fits = bool(parts.scheme and parts.hostname) and not more
    except ValueError:
        fits = False
    if not fits:
        raise ProtectionError(f"cors_origins has {origin[:100]!r}; write each origin out: https://console.example")


def others_may_read(path: Path) -> bool:
    """Returns whether every user of this host can read the file; False if it was removed in the meantime."""
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except FileNotFoundError:
        return False


def read_client_secret(path: Path) -> Secret:
    """Returns the secret in the file of `oidc_client_secret_file`. :raises ProtectionError: there is none."""
    setting = f"oidc_client_secret_file {path}"
    text = _read(path, setting).decode("latin-1").strip()
    if not _CLIENT_SECRET.match(text):
        raise ProtectionError(f"{setting} has to contain one secret of visible ASCII characters, and nothing else")
    return Secret(text)


def _networks(setting: str, members: list[str]) -> tuple[Network, ...]:
    try:
        return tuple(parse_network(member) for member in members)
    except ValueError as error:
        raise ProtectionError(f"{setting}: {error}") from None


def _read(path: Path, setting: str) -> bytes:
    """Returns the content of a file. :raises ProtectionError: it can't be read, is no file or too large."""
    try:
        return read_given(path, _MAX_FILE)
    except UnreadableFile as error:
        raise ProtectionError(f"{setting} {error}") from None


def _read_keys(path: Path, warnings: list[str]) -> list[str]:
    data = _read(path, f"api_key_file {path}")
    if others_may_read(path):
        warnings.append(f"every user of this host can read the API keys in {path}; chmod 600 it")
    lines = [line.strip() for line in data.decode("latin-1").splitlines()]
    keys = [
        _checked(line, f"api_key_file {path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line and not line.startswith("#")
    ]
    if not keys:
        raise ProtectionError(f"api_key_file {path} contains no key; write one a line")
    if len(keys) > _MAX_KEYS:
        raise ProtectionError(f"api_key_file {path} has {len(keys)} keys; at most {_MAX_KEYS} are allowed")
    return keys


def _checked(key: str, where: str) -> str:
    if not _KEY.match(key):
        if len(key) < 16:
            raise ProtectionError(
                f"{where}: the key has {len(key)} characters and could be guessed; use at least 16, for example from "
                "`openssl rand -hex 32`"
            )
        raise ProtectionError(f"{where}: a key must have 16 to 1000 visible ASCII characters without spaces")
    return key
