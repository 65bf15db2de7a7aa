"""The file with the encryption keys of secrets: 64 hexadecimal digits per line; the first key encrypts.

It is read at each use, so that a daemon keeps no key in memory, and needs no restart when an operator restores the
file.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec

from volant.host import Host
from volant.model import CodedError


class SecretFailed(CodedError):
    """The value of a secret is not available. `code`: `secret_missing`, `secret_unreadable`, or `secret_unusable`."""


KEY_BYTES = 32
_MAX_FILE = 64 * 1024
_MAX_KEYS = 100
_KEY = re.compile(r"[0-9a-fA-F]{64}\Z")
_FOR_OTHERS = 0o027
"""Forbidden mode bits: the group may write, or others have any access. A systemd credential may be readable by a
group."""


class EncryptionKey(msgspec.Struct, frozen=True):
    """One key."""

    data: bytes

    @property
    def id(self) -> str:
        """Identifies the key in rows and errors, without revealing it."""
        return hashlib.sha256(b"volant secrets key\0" + self.data).hexdigest()[:8]

    def __repr__(self) -> str:
        return f"EncryptionKey({self.id})"


class KeyFile(msgspec.Struct, frozen=True):
    """The file with the keys of one daemon."""

    host: Host
    path: Path

    async def read(self) -> list[EncryptionKey]:
        """Returns the keys, the one that encrypts first; none if there is no file.

        :raises SecretFailed: it can't be read, others may read it, or it is malformed.
        """
        files = self.host.files
        try:
            if files.mode(self.path) & _FOR_OTHERS:
                raise self._failed("other users of this host may read or change it; chmod 600 it")
            data = await files.read(self.path, _MAX_FILE + 1)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._failed(f"it can't be read: {error.strerror}") from None
        lines = [line.strip() for line in data.decode("latin-1").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not 1 <= len(found) <= _MAX_KEYS or not all(map(_KEY.match, found)):
            raise self._failed("it has not from 1 to 100 lines with 64 hexadecimal digits each")
        return [EncryptionKey(bytes.fromhex(line)) for line in found]

    async def create(self) -> list[EncryptionKey]:
        """Creates the file, with a new key. :raises SecretFailed: it can't be created."""
        files = self.host.files
        key = EncryptionKey(self.host.random.token_bytes(KEY_BYTES))
        try:
            if not files.exists(self.path.parent):
                await files.mkdir(self.path.parent)
            await files.write(self.path, f"{key.data.hex()}\n".encode(), 0o600)
        except OSError as error:
            raise self._failed(f"it can't be made: {error.strerror}") from None
        return [key]

    def _failed(self, why: str) -> SecretFailed:
        return SecretFailed("secret_unreadable", f"the file with the keys of secrets, {self.path}, is of no use: {why}")
