"""Sets, shows and deletes secrets, and returns values to the code that sends them to guests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import trio

from volant.host import Host
from volant.journal import VERSION_CHANGED, JournalRef, ReencryptSecret, RemoveSecret, SealSecret, Store, ask_journal
from volant.model import (
    Key,
    Problem,
    ReencryptedSecrets,
    Secret,
    SecretView,
    SetSecret,
    VmRow,
    no_such_secret,
    secret_view,
    secrets_of,
    value_of,
)

from ._key_file import EncryptionKey, KeyFile, SecretFailed


class SecretValues(msgspec.Struct, frozen=True):
    """The values of a VM's secrets."""

    env: Mapping[str, bytes]
    """The values by environment variable."""
    files: Mapping[str, bytes]
    """The values by path in the guest."""

    def __repr__(self) -> str:
        return "SecretValues(…)"


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

NONCE_BYTES = 12
"""The length of a random nonce. The chance that two of 2**32 values share one is 2**-33, and there are a thousand
values."""
_INSTALL = "pip install 'cryptography>=46'"


class Changed(Exception):
    """An encrypted value was not encrypted with this key, for this project, name and version."""


def seal(key: EncryptionKey, named: Key, version: int, value: bytes, nonce: bytes) -> bytes:
    """Returns the nonce and the encrypted value. :raises Problem: 503, a package is missing."""
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


MAX_TOTAL_BYTES = 512 * 1024
"""Maximum size of all values of one VM together: they are one request to its agent, which accepts at most 1 MiB of
JSON."""
_TRIES = 8
"""Attempts to set a secret, as others may set it at the same time."""


class Secrets(msgspec.Struct):
    """The secrets of one daemon. Rows have encrypted values; no value in plain text is kept."""

    host: Host
    store: Store
    journal: JournalRef
    file: KeyFile
    _making: trio.Lock = msgspec.field(default_factory=trio.Lock)
    """Held while the key file may be created."""

    # Requests

    async def views(self, project: str | None) -> list[SecretView]:
        """Returns the secrets of a project, by name; None for all projects."""
        secrets = sorted(self.store.projection.secrets.items())
        return await self._views([secret for key, secret in secrets if project in (None, key.project)])

    async def view(self, named: Key) -> SecretView:
        """Returns a secret. :raises Problem: 404."""
        secret = self.store.projection.secrets.get(named)
        if secret is None:
            raise no_such_secret(named.name)
        [view] = await self._views([secret])
        return view

    async def set(self, named: Key, request: SetSecret) -> SecretView:
        """Sets a value, which is durable when this returns. VMs receive it at their next boot.

        :raises Problem: 400, the request is invalid; 409, there are too many; 503, it can't be encrypted or stored.
        """
        value = value_of(request)
        try:
            [key, *_] = await self._keys_to_encrypt()
        except SecretFailed as error:
            raise _unusable(error) from error
        for left in reversed(range(_TRIES)):
            before = self.store.projection.secrets.get(named)
            version = 1 if before is None else before.version + 1
            try:
                sealed = self._seal(key, named, version, value)
                secret = await ask_journal(self.journal, SealSecret(named, version, key.id, sealed))
                break
            except Problem as problem:
                if problem.code != VERSION_CHANGED or not left:
                    raise
        [view] = await self._views([secret])
        return view

    async def delete(self, named: Key) -> None:
        """Removes a secret. :raises Problem: 404; 409, a VM refers to it; 503."""
        await ask_journal(self.journal, RemoveSecret(named))

    async def reencrypt(self) -> ReencryptedSecrets:
        """Re-encrypts all secrets that were encrypted with another key of the file with its first key.

        :raises Problem: 503, the file is unusable, or the journal fails; secrets that were already re-encrypted stay
            so.
        """
        try:
            keys = await self._keys_to_encrypt()
        except SecretFailed as error:
            raise _unusable(error) from error
        done, unreadable = 0, []
        for named, secret in sorted(self.store.projection.secrets.items()):
            if secret.key_id == keys[0].id:
                continue
            try:
                sealed = self._seal(keys[0], named, secret.version, self._unseal(secret, keys))
                await ask_journal(self.journal, ReencryptSecret(named, secret.version, keys[0].id, sealed))
                done += 1
            except SecretFailed:
                unreadable.append(f"{named.project}/{named.name}")
            except Problem as problem:
                # A client has set it meanwhile, so it is encrypted with the first key.
                if problem.code != VERSION_CHANGED:
                    raise
        return ReencryptedSecrets(done, tuple(unreadable))

    # For VMs

    async def values_for(self, row: VmRow) -> SecretValues:
        """Returns the present values of a VM's secrets. :raises SecretFailed:"""
        names = secrets_of(row)
        values: dict[str, bytes] = {}
        if names:
            keys = await self.file.read()
            for name in names:
                secret = self.store.projection.secrets.get(Key(row.project, name))
                if secret is None:
                    raise SecretFailed(
                        "secret_missing", f"the VM needs the secret {name!r}, and there is none",
                        f"`volar secrets set {name} < FILE` sets it",
                    )  # fmt: skip
                values[name] = self._unseal(secret, keys)
        found = SecretValues(
            {variable: _for_environment(name, values[name]) for variable, name in row.secret_env.items()},
            {file.path: values[file.name] for file in row.secrets},
        )
        if sum(map(len, (*found.env.values(), *found.files.values()))) > MAX_TOTAL_BYTES:
            raise SecretFailed(
                "secret_unusable", f"the secrets of the VM have more than {MAX_TOTAL_BYTES // 1024} KiB together"
            )
        return found

    async def value(self, named: Key, *, field: str | None = None) -> bytes:
        """Returns the present value of a secret. :raises Problem: 404; 503, it can't be decrypted.

        :param field: the member of a request with its name
        """
        secret = self.store.projection.secrets.get(named)
        if secret is None:
            raise no_such_secret(named.name, field=field)
        try:
            return self._unseal(secret, await self.file.read())
        except SecretFailed as error:
            raise _unusable(error) from error

    # Encryption

    async def _keys_to_encrypt(self) -> list[EncryptionKey]:
        """Returns the keys, and creates the first one if there was never a secret. :raises SecretFailed:"""
        async with self._making:
            keys = await self.file.read()
            if keys:
                return keys
            encrypted = len(self.store.projection.secrets)
            if encrypted:
                # With a new key, the loss of the old one would show only when a VM boots.
                raise SecretFailed(
                    "secret_unreadable",
                    f"the file with the keys of secrets, {self.file.path}, is gone, and {encrypted} secrets are "
                    "encrypted with what was in it",
                    "put it back; or make another key with "
                    f"`(umask 077; openssl rand -hex 32 > {self.file.path})`, and set all secrets again",
                )
            return await self.file.create()

    def _seal(self, key: EncryptionKey, named: Key, version: int, value: bytes) -> bytes:
        return seal(key, named, version, value, self.host.random.token_bytes(NONCE_BYTES))

    def _unseal(self, secret: Secret, keys: Sequence[EncryptionKey]) -> bytes:
        again = f"or set the secret again: volar secrets set {secret.name} < FILE"
        for key in keys:
            if key.id == secret.key_id:
                break
        else:
            raise SecretFailed(
                "secret_unreadable",
                f"the secret {secret.name!r} is encrypted with the key {secret.key_id}, which {self.file.path} "
                + ("does not have" if keys else "would have, and there is no such file"),
                f"put that key back, {again}",
            )
        try:
            return unseal(key, secret.key, secret.version, secret.sealed)
        except Changed:
            raise SecretFailed(
                "secret_unreadable",
                f"the row of the secret {secret.name!r} in project {secret.project!r} is not what the daemon has "
                "written: it was changed, or moved from another secret",
                f"restore a backup, {again}",
            ) from None
        except Problem as problem:
            raise SecretFailed("secret_unreadable", problem.detail, problem.hint or "") from None

    async def _views(self, secrets: Sequence[Secret]) -> list[SecretView]:
        try:
            known = {key.id for key in await self.file.read()} if secrets else set()
        except SecretFailed:
            known = set()
        users: dict[Key, list[str]] = {}
        for row in self.store.projection.rows():
            for name in secrets_of(row):
                users.setdefault(Key(row.project, name), []).append(row.name)
        return [
            secret_view(secret, readable=secret.key_id in known, used_by=users.get(secret.key, ()))
            for secret in secrets
        ]


def _for_environment(name: str, value: bytes) -> bytes:
    """Returns a value that is valid for a variable. :raises SecretFailed: it is not."""
    try:
        if "\0" in value.decode():
            raise ValueError
    except ValueError:
        raise SecretFailed(
            "secret_unusable", f"the secret {name!r} can't be an environment variable: it is not UTF-8 without NUL",
            "give it to the VM as a file, with `secrets`",
        ) from None  # fmt: skip
    return value


def _unusable(error: SecretFailed) -> Problem:
    return Problem(503, "secrets-key-unusable", error.message, hint=error.hint or None)
