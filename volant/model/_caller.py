"""The client that a task serves, for logs and events."""

from __future__ import annotations

from contextvars import ContextVar

current_caller: ContextVar[str | None] = ContextVar("volant.caller", default=None)
"""The caller of the request that this task serves, for people: an address, perhaps with the digest of a key, or a user
of this host; None outside of requests. The API sets it. Messages carry it to actors."""
