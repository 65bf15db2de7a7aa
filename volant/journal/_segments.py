"""The files of a VM's log: one record a line, only ever appended to.

    SOURCE POSITION TIME FRAME      a record; FRAME is the JSON that readers get, TIME is in µs since 1970
    # {"seq":…,"resume":{…},…}      a checkpoint: what number is next, and where each source had got to

The number of a record is not in front of it: it follows from the checkpoint before it. A segment begins with a
checkpoint, and gets one every `CHECKPOINT_BYTES`, so that opening a log reads its last few hundred kilobytes, however
long it is and however long one of its sources has been silent.

POSITION is where to go on in SOURCE after this record. It is `-` for all parts but the last of a line that was split,
as one can't go on in the middle of one. So what a torn write leaves behind the last record with a position is
dropped, and its source brings it again: exactly once.

Nothing is ever cut off a file. A torn end stays where it is, and a new segment begins: its name says at which number,
and nobody reads the one before any further than that. Rejected: fixed-size binary records with an index (faster seeks,
but `less` and `grep` are what people have at three in the morning); SQLite (a flood of lines would fight with the
events for the one writer, and the log need not survive a power cut, in which its VM dies anyway).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from volant.host import Host

CHECKPOINT_BYTES = 256 * 1024
MAX_SOURCES = 64
"""Positions that are remembered; a guest that invents sources pushes out its own oldest."""

_CHUNK = 512 * 1024
_NAME = re.compile(r"(\d+)-(\d{16,})-(\d+)\.log")


class Segment:
    """One file. `size` is what has been written to it by us, whatever the file's end looks like."""

    __slots__ = ("at_us", "first", "path", "size")

    def __init__(self, path: Path, first: int, at_us: int, size: int) -> None:
        self.path = path
        self.first = first
        self.at_us = at_us
        self.size = size

    @classmethod
    def fresh(cls, directory: Path, vm_id: int, first: int, at_us: int) -> Segment:
        """One that is not on the disk yet."""
        return cls(directory / f"{vm_id}-{first:016d}-{at_us}.log", first, at_us, 0)


def segment_of(host: Host, path: Path) -> tuple[int, Segment] | None:
    """The VM's id and the segment that the file at `path` is; None when it is none. :raises OSError:"""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    return int(match[1]), Segment(path, int(match[2]), int(match[3]), host.files.size(path))


class Checkpoint(msgspec.Struct, frozen=True):
    """What a checkpoint says."""

    seq: int
    name: str
    resume: dict[str, int]


def checkpoint_line(next_seq: int, name: str, resume: dict[str, int]) -> bytes:
    return b"# " + msgspec.json.encode(Checkpoint(next_seq, name, resume)) + b"\n"


class Recovered(msgspec.Struct, frozen=True):
    """The end of a log, as found on the disk."""

    newest: int
    name: str
    resume: dict[str, int]
    last_us: int
    """When the newest record was; 0 when there is none in this segment."""
    whole: bool
    """Whether one can go on in this segment."""


def recover(host: Host, segment: Segment) -> Recovered | None:
    """Find out where a segment ends; None when not even its beginning can be used. :raises OSError:"""
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
            except msgspec.MsgspecError:
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
    return Recovered(newest, checkpoint.name, resume, last_us, whole == len(data))


def remember(resume: dict[str, int], source: str, position: int) -> None:
    """Note where a source has got to; the one that was silent for longest makes room."""
    resume.pop(source, None)
    resume[source] = position
    if len(resume) > MAX_SOURCES:
        del resume[next(iter(resume))]


class Place(msgspec.Struct, frozen=True):
    """A place between two records: after number `seq`, at `offset` of a segment."""

    seq: int
    offset: int


class Found(msgspec.Struct, frozen=True):
    """What `read` found: frames, and where to go on. `end`: there is no more of the segment."""

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
) -> Found:
    """Read from `place` on: the frames numbered after `after` and at most `up_to`, from the time `since_us` on, that
    begin with one of `heads` (all when empty). Blocks on the disk. :raises OSError:
    """
    wanted = tuple(heads)
    frames: list[bytes] = []
    seq, offset = place.seq, place.offset
    taken = 0
    fd = host.descriptors.open(path, os.O_RDONLY)
    try:
        while True:
            data = host.descriptors.read_at(fd, min(_CHUNK, size - offset), offset)
            if b"\0" in data:
                # A power cut has left it. What follows can't be numbered: whoever reads is told that it is missing.
                data = data[: data.index(b"\0")]
            begin = 0
            while (stop := data.find(b"\n", begin)) >= 0:
                if not data.startswith(b"# ", begin):
                    if seq >= up_to:
                        return Found(frames, Place(seq, offset + begin), True)
                    if seq + 1 > after:
                        fields = data[begin:stop].split(b" ", 3)
                        if len(fields) != 4 or not fields[2].isdigit():
                            return Found(frames, Place(seq, offset + begin), True)
                        time_us, frame = fields[2:]
                        if (not since_us or int(time_us) >= since_us) and (not wanted or frame.startswith(wanted)):
                            since_us = 0
                            taken += len(frame)
                            if taken > max_bytes and frames:
                                return Found(frames, Place(seq, offset + begin), False)
                            frames.append(frame)
                    seq += 1
                begin = stop + 1
            if not begin:
                return Found(frames, Place(seq, offset), True)
            offset += begin
            if frames:
                return Found(frames, Place(seq, offset), offset >= size)
    finally:
        host.descriptors.close(fd)


def count_back(host: Host, segment: Segment, up_to: int, heads: Sequence[bytes], wanted: int) -> tuple[int, int]:
    """Where the last `wanted` frames of these heads begin in a segment: how many of them it has, at most `wanted`, and
    the number before the first. Blocks on the disk. :raises OSError:
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
