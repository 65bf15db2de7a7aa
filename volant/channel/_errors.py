"""The errors of a channel."""

from __future__ import annotations

WHY_CHARACTERS = 300
"""The longest text of a parser's error. It may quote a whole head of the guest, and gets into rows and events."""


class AgentUnreachable(Exception):
    """No byte stream into the guest could be opened, or it broke before the answer was whole.

    The guest may be booting, hung or gone. A request that was sent may have had an effect.
    """


class AgentProtocolError(Exception):
    """The agent's answer is malformed. Not our bug, as a guest is not trusted."""


class LinkLost(Exception):
    """A link has ended, and its streams are broken. The channel makes the next one."""
