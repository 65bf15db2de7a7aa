"""Named API keys: creates, replaces and deletes them, and finds the caller with a key.

The daemon stores and logs only the digests of keys; the client that creates a key receives it once. The time and
address of the last use are kept in memory and written once a minute, because a commit for each request would cost more
than the request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import sha256

import msgspec
import trio

from volant.host import Host
from volant.journal import AddKey, JournalRef, NoteKeyUses, RemoveKey, RotateKey, Store, ask_journal
from volant.model import (
    KEY_PREFIX,
    ApiKey,
    ApiKeyView,
    Caller,
    CallerEnded,
    CreateApiKey,
    KeyUse,
    NewApiKey,
    Problem,
    RotateApiKey,
    key_view,
    no_such_key,
)

WRITE_USES_S = 60.0
"""The interval at which last uses are saved."""
_CHECK_S = 60.0
"""Maximum time between two checks for expired keys, because the clock may be set in between."""
_KEY_BYTES = 32

_logger = logging.getLogger("volant.identity")


class NamedKeys:
    """Holds the named keys of the daemon."""

    def __init__(self, host: Host, store: Store, journal: JournalRef) -> None:
        self._host = host
        self._store = store
        self._journal = journal
        self._uses: dict[str, KeyUse] = {}
        """Last uses that are not written yet, by digest."""

    async def keep(
        self, recheck: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Calls `recheck` whenever keys have changed or expired, and writes their uses, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_uses)
            task_status.started()
            while True:
                recheck()
                with trio.move_on_after(self._until_next_expiry_s()):
                    await self._store.keys.changed()

    # For access control

    @property
    def required(self) -> bool:
        """Whether a named key was ever created. From then on, clients over TCP need credentials."""
        return self._store.keys.required

    def caller(self, digest: str, address: str) -> Caller | None:
        """Returns the caller with the key of this digest, and records its use; None if there is no such key.

        :raises CallerEnded: it has expired.
        """
        key = self._store.keys.find(digest)
        if key is None:
            return None
        now = self._host.clock.now()
        caller = Caller(key.id, f"key:{key.name}", key.role, key.project, address, digest, limited=True)
        if not key.is_valid(now):
            raise CallerEnded(
                caller, "key-expired", _expired(key),
                hint=f"an administrator makes another one with `volar keys rotate {key.name}`",
            )  # fmt: skip
        self._uses[digest] = KeyUse(now, address)
        return caller

    def ended(self, digest: str) -> str | None:
        """Returns why the key with this digest is not valid any more; None if it is valid."""
        key = self._store.keys.find(digest)
        if key is None:
            return "the API key was deleted or replaced"
        return None if key.is_valid(self._host.clock.now()) else _expired(key)

    # For operations

    async def create(self, request: CreateApiKey, *, by: str, has_administrator: bool) -> NewApiKey:
        """Creates a key. :raises Problem: see `AddKey`."""
        secret, digest = self._new_key()
        key = await ask_journal(
            self._journal, AddKey(request, digest, self._host.random.new_id(), by, has_administrator)
        )
        _logger.info("%s created the key %s of the role %s", by, key.name, key.role.value)
        return NewApiKey(key.name, secret)

    async def rotate(self, name: str, request: RotateApiKey, *, by: str) -> NewApiKey:
        """Replaces a key. :raises Problem: see `RotateKey`."""
        secret, digest = self._new_key()
        await ask_journal(self._journal, RotateKey(name, request, digest, by))
        _logger.info("%s replaced the key %s", by, name)
        return NewApiKey(name, secret)

    async def delete(self, name: str, *, by: str, has_administrator: bool) -> None:
        """Deletes a key, including those that it replaced. :raises Problem: see `RemoveKey`."""
        await ask_journal(self._journal, RemoveKey(name, has_administrator))
        _logger.info("%s deleted the key %s", by, name)

    def views(self) -> list[ApiKeyView]:
        """Returns all keys, by name."""
        return [self.view(name) for name in self._store.keys.names()]

    def view(self, name: str) -> ApiKeyView:
        """Returns the name, role, project and times of a key. :raises Problem: 404."""
        keys = [self._with_use(key) for key in self._store.keys.of(name)]
        if not keys:
            raise no_such_key(name)
        return key_view(keys, self._host.clock.now())

    def _new_key(self) -> tuple[str, str]:
        secret = KEY_PREFIX + self._host.random.token_bytes(_KEY_BYTES).hex()
        return secret, sha256(secret.encode()).hexdigest()

    def _with_use(self, key: ApiKey) -> ApiKey:
        use = self._uses.get(key.digest)
        return key if use is None else msgspec.structs.replace(key, used=use)

    def _until_next_expiry_s(self) -> float:
        now = self._host.clock.now()
        keys = self._store.keys.by_digest.values()
        times = [key.expires_at for key in keys if key.expires_at is not None and key.expires_at > now]
        return min(_CHECK_S, (min(times) - now).total_seconds()) if times else _CHECK_S

    async def _write_uses(self) -> None:
        while True:
            await trio.sleep(WRITE_USES_S)
            uses, self._uses = self._uses, {}
            if not uses:
                continue
            try:
                await ask_journal(self._journal, NoteKeyUses(uses))
            except Problem as problem:
                # They are written with the next ones.
                self._uses = uses | self._uses
                _logger.warning(
                    "the last uses of API keys can't be saved, and are saved a minute later: %s", problem.detail
                )


def _expired(key: ApiKey) -> str:
    assert key.expires_at is not None
    return f"the API key {key.name!r} expired at {key.expires_at:%Y-%m-%d %H:%M:%S} UTC"
