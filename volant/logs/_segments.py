"""The files of a VM's log: one record a line, only ever appended to.

    SOURCE POSITION TIME FRAME      a record; FRAME is the JSON that readers get, TIME is in µs since 1970
    # {"seq":…,"resume":{…},…}      a checkpoint: the next number, and the position in each source

The number of a record follows from the checkpoint before it. A segment begins with a checkpoint, and gets one every
`CHECKPOINT_BYTES`. So opening a log reads its last few hundred kilobytes, however long it is.

POSITION is where to continue in SOURCE after this record. It is `-` for all parts but the last of a split line, as a
source can't continue within a line. Records of a torn write after the last position are dropped, and their source sends
them again: exactly once.

Nothing is ever cut off a file. A torn end stays, and a new segment begins, whose name has its first number; readers of
the old one stop there. Rejected: binary records of a fixed size with an index (faster, but people read logs with `less`
and `grep`); and SQLite (a flood of lines would compete with events for the one writer, and a log need not survive a
power cut).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from volant.host import Host
from volant.model import DEFAULT_PROJECT, Key

CHECKPOINT_BYTES = 256 * 1024
MAX_SOURCES = 64
"""Positions that are remembered. A guest that invents sources loses its own oldest."""

_CHUNK = 512 * 1024
_NAME = re.compile(r"(\d+)-(\d{16,})-(\d+)\.log")


class Segment(msgspec.Struct, eq=False):
    """One file. `size` counts whole records, although the file may have a torn end."""

    path: Path
    first: int
    at_us: int
    size: int

    @classmethod
    def fresh(cls, directory: Path, vm_id: int, first: int, at_us: int) -> Segment:
        """Returns a segment that is not on the disk yet."""
        return cls(directory / f"{vm_id}-{first:016d}-{at_us}.log", first, at_us, 0)


def segment_of(host: Host, path: Path) -> tuple[int, Segment] | None:
    """Returns the VM's id and the segment for a file; None when it is no segment. :raises OSError:"""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    return int(match[1]), Segment(path, int(match[2]), int(match[3]), host.files.size(path))


class Checkpoint(msgspec.Struct, frozen=True, omit_defaults=True):
    """The content of a checkpoint."""

    seq: int
    name: str
    resume: dict[str, int]
    project: str = DEFAULT_PROJECT


def checkpoint_line(next_seq: int, vm: Key, resume: dict[str, int]) -> bytes:
    return b"# " + msgspec.json.encode(Checkpoint(next_seq, vm.name, resume, vm.project)) + b"\n"


class Recovered(msgspec.Struct, frozen=True):
    """The end of a log on the disk."""

    newest: int
    vm: Key
    resume: dict[str, int]
    last_us: int
    """The time of the newest record; 0 when this segment has none."""
    whole: bool
    """Whether the segment has no torn end and can be continued."""


def recover(host: Host, segment: Segment) -> Recovered | None:
    """Finds the end of a segment. Returns None if it has no checkpoint. :raises OSError:"""
    fd = host.descriptors.open(segment.path, os.O_RDONLY)
    try:
        start = segment.size
        tail = b""
        while True:
            begin = max(0, start - _CHUNK)
            tail = host.descriptors.read_at(fd, start - begin, begin) + tail
            start = begin
            checkpoint, offset = _last_checkpoint(tail, at_start=start == 0)
            if checkpoint is not None:
                return _replay(checkpoint, tail, offset)
            if start == 0:
                return None
    finally:
        host.descriptors.close(fd)


def _last_checkpoint(data: bytes, *, at_start: bool) -> tuple[Checkpoint | None, int]:
    end = len(data)
    while True:
        found = data.rfind(b"\n# ", 0, end)
        begin = found + 1 if found >= 0 else 0
        if found < 0 and not (at_start and data.startswith(b"# ")):
            return None, 0
        stop = data.find(b"\n", begin)
        if stop >= 0:
            try:
                return msgspec.json.decode(data[begin + 2 : stop], type=Checkpoint), stop + 1
            except ValueError:
                pass
        if found < 0:
            return None, 0
        end = found + 1


def _replay(checkpoint: Checkpoint, data: bytes, offset: int) -> Recovered:
    seq = newest = checkpoint.seq - 1
    resume = dict(checkpoint.resume)
    last_us = 0
    whole = offset
    while (stop := data.find(b"\n", offset)) >= 0:
        fields = data[offset:stop].split(b" ", 3)
        if len(fields) != 4 or not fields[2].isdigit() or not fields[3].endswith(b"}") or b"\0" in fields[3]:
            break
        seq += 1
        offset = stop + 1
        if fields[1].isdigit():
            remember(resume, fields[0].decode("ascii", "replace"), int(fields[1]))
            newest, last_us, whole = seq, int(fields[2]), offset
    return Recovered(newest, Key(checkpoint.project, checkpoint.name), resume, last_us, whole == len(data))


def remember(resume: dict[str, int], source: str, position: int) -> None:
    """Remembers the position in a source. The source that was silent for longest makes room."""
    resume.pop(source, None)
    resume[source] = position
    if len(resume) > MAX_SOURCES:
        del resume[next(iter(resume))]


class Place(msgspec.Struct, frozen=True):
    """A place between two records: after number `seq`, at `offset` of a segment."""

    seq: int
    offset: int


class FoundFrames(msgspec.Struct, frozen=True):
    """The result of `read`: frames, and where to continue. `end`: the segment has no more."""

    frames: list[bytes]
    place: Place
    end: bool


def read(
    host: Host,
    path: Path,
    size: int,
    place: Place,
    *,
    after: int,
    up_to: int,
    since_us: int,
    heads: Sequence[bytes],
    max_bytes: int,
) -> FoundFrames:
    """Reads frames from `place` on that begin with one of `heads` (all when empty), in at most half a megabyte: perhaps
    none. Blocks on the disk.

    :param after, up_to: the numbers: above `after`, at most `up_to`
    :param since_us: the time of the first frame
    :raises OSError: the disk fails.
    """
    wanted = tuple(heads)
    frames: list[bytes] = []
    seq, offset = place.seq, place.offset
    taken = 0
    fd = host.descriptors.open(path, os.O_RDONLY)
    try:
        data = host.descriptors.read_at(fd, min(_CHUNK, size - offset), offset)
        if b"\0" in data:
            # A power cut has left it. What follows has no known number, so a reader gets a gap.
            data = data[: data.index(b"\0")]
        begin = 0
        while (stop := data.find(b"\n", begin)) >= 0:
            if not data.startswith(b"# ", begin):
                if seq >= up_to:
                    return FoundFrames(frames, Place(seq, offset + begin), True)
                if seq + 1 > after:
                    fields = data[begin:stop].split(b" ", 3)
                    if len(fields) != 4 or not fields[2].isdigit():
                        return FoundFrames(frames, Place(seq, offset + begin), True)
                    time_us, frame = fields[2:]
                    if (not since_us or int(time_us) >= since_us) and (not wanted or frame.startswith(wanted)):
                        since_us = 0
                        taken += len(frame)
                        if taken > max_bytes and frames:
                            return FoundFrames(frames, Place(seq, offset + begin), False)
                        frames.append(frame)
                seq += 1
            begin = stop + 1
        return FoundFrames(frames, Place(seq, offset + begin), not begin or offset + begin >= size)
    finally:
        host.descriptors.close(fd)


def count_back(host: Host, segment: Segment, up_to: int, heads: Sequence[bytes], wanted: int) -> tuple[int, int]:
    """Finds the last `wanted` frames with these heads in a segment. Blocks on the disk.

    Returns how many it has, at most `wanted`, and the number before the first.

    :raises OSError: the disk fails.
    """
    matches: list[int] = []
    place, end = Place(segment.first - 1, 0), False
    while not end:
        before = place
        found = read(
            host, segment.path, segment.size, place, after=0, up_to=up_to, since_us=0, heads=(), max_bytes=_CHUNK
        )
        place, end = found.place, found.end
        head = tuple(heads)
        matches += [
            before.seq + index + 1 for index, frame in enumerate(found.frames) if not head or frame.startswith(head)
        ]
        del matches[: max(0, len(matches) - wanted)]
    return len(matches), (matches[0] - 1 if matches else segment.first - 1)
