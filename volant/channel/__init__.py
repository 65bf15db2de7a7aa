"""Byte streams into a guest, and HTTP to its agent on them."""

from ._agent import AgentAnswer, AgentClient, AgentResponse
from ._channel import Channel, ChannelStatistics, ParkedLink, open_channel, run_channel
from ._stream import Address, AgentProtocolError, AgentUnreachable, ChannelStream, VirtioSerial, Vsock

__all__ = [
    "Address",
    "AgentAnswer",
    "AgentClient",
    "AgentProtocolError",
    "AgentResponse",
    "AgentUnreachable",
    "Channel",
    "ChannelStatistics",
    "ChannelStream",
    "ParkedLink",
    "VirtioSerial",
    "Vsock",
    "open_channel",
    "run_channel",
]
