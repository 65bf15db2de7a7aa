"""Byte streams into a guest, and HTTP to its agent on them."""

from ._agent import AgentAnswer as AgentAnswer, AgentClient as AgentClient, AgentResponse as AgentResponse
from ._channel import (
    Channel as Channel,
    ChannelStatistics as ChannelStatistics,
    ParkedLink as ParkedLink,
    open_channel as open_channel,
    run_channel as run_channel,
)
from ._stream import (
    Address as Address,
    AgentProtocolError as AgentProtocolError,
    AgentUnreachable as AgentUnreachable,
    ChannelStream as ChannelStream,
    VirtioSerial as VirtioSerial,
    Vsock as Vsock,
)
