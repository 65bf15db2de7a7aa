"""Who asks for what is being done, for logs and events."""

from __future__ import annotations

from contextvars import ContextVar

current_caller: ContextVar[str | None] = ContextVar("volant.caller", default=None)
"""The caller of the request that this task serves, as people read it: an address, perhaps with the digest of a key, or
a user of this host; None outside of requests. The API sets it. It does not cross over to an actor by itself: messages
carry it."""
