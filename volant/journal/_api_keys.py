"""The committed API keys in memory. A lookup by digest takes the same time with any number of keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

import apsw
import trio

from volant.model import ApiKey

from ._schema import open_reader


def requires_keys(path: Path) -> bool:
    """Whether the database at `path` closes TCP for clients without a key. False when it can't be read. Blocks on the
    disk."""
    if not path.exists():
        return False
    try:
        with closing(open_reader(path)) as reader:
            return bool(reader.execute("SELECT count(*) FROM meta WHERE key = 'keys_required'").get)
    except apsw.Error:
        return False


class ApiKeys:
    """All named keys. Everybody may read; only the journal writes, after a commit."""

    def __init__(self) -> None:
        self._by_digest: dict[str, ApiKey] = {}
        # Plain tuples of text, so that thousands cost the garbage collector nothing.
        self._by_name: dict[str, tuple[str, ...]] = {}
        self._changed = trio.Event()
        self.required = False
        """Whether there was ever a named key. From then on TCP is closed for clients without a key."""

    @property
    def by_digest(self) -> Mapping[str, ApiKey]:
        """A live view, with the keys that were replaced."""
        return MappingProxyType(self._by_digest)

    def find(self, digest: str) -> ApiKey | None:
        """Returns the key with this digest; it may have expired."""
        return self._by_digest.get(digest)

    def of(self, name: str) -> list[ApiKey]:
        """Returns the key of this name and those that it replaced; empty when there is none."""
        return [self._by_digest[digest] for digest in self._by_name.get(name, ())]

    def names(self) -> list[str]:
        """Returns the names of all, sorted."""
        return sorted(self._by_name)

    async def changed(self) -> None:
        """Waits until keys are added or removed, or keys are required. Notes of their use don't count."""
        await self._changed.wait()

    # For the journal alone

    def replace(self, keys: Iterable[ApiKey], required: bool) -> None:
        """Take over what was loaded from the database."""
        self._by_digest = {}
        self._by_name = {}
        self.apply({key.digest: key for key in keys}, required)

    def apply(self, changes: Mapping[str, ApiKey | None], required: bool) -> None:
        """Take over what a commit changed; None stands for what it removed."""
        is_new = required != self.required
        self.required = required
        for digest, key in changes.items():
            before = self._by_digest.pop(digest, None)
            if before is not None:
                self._drop_name(before)
            if key is not None:
                self._by_digest[digest] = key
                self._by_name[key.name] = (*self._by_name.get(key.name, ()), digest)
            is_new = is_new or before is None or key is None or before.expires_at != key.expires_at
        if is_new:
            self._changed.set()
            self._changed = trio.Event()

    def _drop_name(self, key: ApiKey) -> None:
        left = tuple(digest for digest in self._by_name.pop(key.name) if digest != key.digest)
        if left:
            self._by_name[key.name] = left
