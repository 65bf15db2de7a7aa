"""Carries the workload's output from the agent's frames into the VM's log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from volant.channel import AgentClient, AgentProtocolError, AgentResponse
from volant.logs import LogEntry, VmLog
from volant.model.agent import (
    DAEMON_LOGS,
    FRAME_STDERR,
    FRAME_STDERR_GAP,
    FRAME_STDOUT,
    FRAME_STDOUT_GAP,
    LOG_ID_HEADER,
    LogDecoder,
    gap_length,
)

from ._lines import Line, LineSplitter, piece_of

_Stream = Literal["stdout", "stderr"]
_NAMES: tuple[_Stream, ...] = ("stdout", "stderr")
_STREAMS: dict[int, _Stream] = {
    FRAME_STDOUT: "stdout",
    FRAME_STDOUT_GAP: "stdout",
    FRAME_STDERR: "stderr",
    FRAME_STDERR_GAP: "stderr",
}
_OPEN_TIMEOUT_S = 30.0
_LINES_AT_ONCE = 1000
_MAX_CLOCK_NS = 253_402_300_799 * 10**9  # the last second of the year 9999


async def pump_output(client: AgentClient, log: VmLog, boot_key: str, log_id: str) -> str:
    """Carries the workload's output into the log until the stream ends; returns the agent's log id.

    `log_id`: what the last call for this boot returned, or empty. The positions of an agent that was restarted start
    over; then this returns at once, and the next call asks for the right ones.

    :raises AgentUnreachable: the agent does not answer, or the stream broke.
    :raises AgentProtocolError: the agent does not send a log.
    """
    positions = {stream: log.resume_position(_source(boot_key, log_id, stream)) for stream in _NAMES}
    target = f"{DAEMON_LOGS}?stdout={positions['stdout']}&stderr={positions['stderr']}"
    async with client.stream("GET", target, timeout_s=_OPEN_TIMEOUT_S, reserved=True) as response:
        if response.status != 200:
            raise AgentProtocolError(f"the agent answered the request for the output with {response.status}")
        newest = _log_id(response)
        if newest != log_id:
            known = {stream: log.resume_position(_source(boot_key, newest, stream)) for stream in _NAMES}
            if known != positions:
                return newest
        splitters = {stream: LineSplitter(position) for stream, position in positions.items()}
        decoder = LogDecoder()
        when = datetime.fromtimestamp(0, UTC)

        def entries(stream: _Stream, lines: list[Line]) -> list[LogEntry]:
            source = _source(boot_key, newest, stream)
            return [
                LogEntry(
                    stream=stream,
                    line=line.data,
                    timestamp=when,
                    partial=line.partial,
                    source=source,
                    position=line.end,
                )
                for line in lines
            ]

        async for chunk in response:
            batch: list[LogEntry] = []
            frames = size = 0
            for kind, position, time_ns, data in decoder.feed(chunk):
                stream = _STREAMS[kind]
                splitter = splitters[stream]
                when = datetime.fromtimestamp(min(time_ns, _MAX_CLOCK_NS) / 1e9, UTC)
                frames += 1
                if kind in (FRAME_STDOUT_GAP, FRAME_STDERR_GAP):
                    lost = gap_length(data)
                    lines = splitter.skip_to(position + lost)
                    lines.append(Line(b"[%d bytes are lost]" % lost, False, position + lost))
                    batch += entries(stream, lines)
                    continue
                lines = splitter.skip_to(position) if position != splitter.position else []
                start = 0
                while start < len(data):
                    piece = piece_of(data, start)
                    start += len(piece)
                    batch += entries(stream, lines + splitter.feed(piece))
                    lines = []
                    size += len(piece)
                    if len(batch) + frames >= _LINES_AT_ONCE:
                        log.append(batch)
                        await log.throttle(len(batch) + frames, size)
                        batch = []
                        frames = size = 0
                batch += entries(stream, lines)
            if batch:
                log.append(batch)
            await log.throttle(len(batch) + frames, size)
        # The guest has shut down, or the agent has ended: the unfinished lines are the last ones.
        for stream, splitter in splitters.items():
            if rest := splitter.flush():
                log.append(entries(stream, rest))
        return newest


def _log_id(response: AgentResponse) -> str:
    name = LOG_ID_HEADER.lower().encode()
    for key, value in response.headers:
        if key == name:
            return value[:64].decode("latin-1")
    raise AgentProtocolError(f"the agent's answer has no header {LOG_ID_HEADER}")


def _source(boot_key: str, log_id: str, stream: str) -> str:
    return f"{boot_key}/{log_id}/{stream}"
