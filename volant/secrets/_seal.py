"""Encrypts values and decrypts them: ChaCha20-Poly1305, bound to the project, the name and the version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volant.model import Key, Problem

from ._key_file import EncryptionKey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

NONCE_BYTES = 12
"""Random. Two of 2**32 values are encrypted with the same one by a chance of 2**-33, and there are a thousand."""
_INSTALL = "pip install 'cryptography>=46'"


class Changed(Exception):
    """An encrypted value is not what was encrypted with this key, for this project, name and version."""


def seal(key: EncryptionKey, named: Key, version: int, value: bytes, nonce: bytes) -> bytes:
    """Returns the nonce and the encrypted value. :raises Problem: 503 a package is missing."""
    return nonce + _cipher(key).encrypt(nonce, value, _bound_to(named, version))


def unseal(key: EncryptionKey, named: Key, version: int, sealed: bytes) -> bytes:
    """Returns the value. :raises Changed: :raises Problem: 503 a package is missing."""
    cipher = _cipher(key)
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _bound_to(named, version))
    except (InvalidTag, ValueError):
        # Too short for a nonce and a tag.
        raise Changed from None


def _bound_to(named: Key, version: int) -> bytes:
    return "\0".join(("volant secret 1", named.project, named.name, str(version))).encode()


def _cipher(key: EncryptionKey) -> ChaCha20Poly1305:
    try:
        # It takes 20 ms, and most daemons have no secrets.
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    except ImportError as error:
        raise Problem(
            503, "secrets-unavailable", f"secrets need the package cryptography, which can't be imported: {error}",
            hint=f"install it for the daemon and start that again: {_INSTALL}",
        ) from None  # fmt: skip
    return ChaCha20Poly1305(key.data)
