"""What goes wrong between the host and a guest."""

from __future__ import annotations

WHY_CHARACTERS = 300
"""Of what a parser says of a guest's bytes. They are in it, perhaps a whole head, and it gets into rows and events."""


class AgentUnreachable(Exception):
    """No byte stream into the guest could be opened, or it broke before the answer was whole.

    The message is for people. The guest may be booting, hung or gone; it says nothing of whether a request that was
    sent had an effect.
    """


class AgentProtocolError(Exception):
    """The agent answered with something that is not the protocol. A guest is not trusted, so this is no bug of ours."""


class LinkLost(Exception):
    """A multiplexed link has ended and every stream on it has broken. The channel makes the next one."""
