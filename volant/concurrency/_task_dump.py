"""Dumps all tasks and threads of this process as text, for `SIGUSR1` and `GET /api/v1/system/tasks`.

The dump shows the position of each one, by file, line and function. It never shows the value of a variable, which may
be a key. Sibling tasks with the same stack are shown once, so that a thousand VMs are as easy to read as one.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import msgspec
import trio

MAX_LINES = 4000
_MAX_FRAMES = 12
_MAX_DEPTH = 60
_NAMES = 3
_HERE = f"{Path(__file__).resolve().parents[2]}/"


class _Group(msgspec.Struct):
    """Siblings with the same stack and the same children."""

    shape: str
    stack: tuple[str, ...]
    children: list[_Group]
    names: list[str] = msgspec.field(default_factory=list)

    def join(self, other: _Group) -> None:
        """Merges a group of the same shape."""
        self.names += other.names
        for mine, its in zip(self.children, other.children, strict=True):
            mine.join(its)

    def count(self) -> int:
        return len(self.names) + sum(child.count() for child in self.children)


def dump_tasks() -> str:
    """Returns all tasks of the current Trio run as a tree, then all threads."""
    root = trio.lowlevel.current_root_task()
    tasks = _groups([root] if root is not None else [], 0)
    threads = _threads()
    lines = [f"{sum(map(_Group.count, tasks))} tasks, {sum(map(_Group.count, threads))} threads"]
    for group in tasks:
        lines += _lines(group, "")
    for group in threads:
        lines += _lines(group, "", "thread ")
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"… and {len(lines) - MAX_LINES} more lines"]
    return "\n".join(lines)


def _groups(tasks: Iterable[trio.lowlevel.Task], depth: int) -> list[_Group]:
    found: list[_Group] = []
    for task in tasks:
        below = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        children = _groups(below, depth + 1) if depth < _MAX_DEPTH else []
        found.append(_group(task.name, _places_of(task), children))
    return _joined(found)


def _threads() -> list[_Group]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for ident, frame in sys._current_frames().items():
        places: list[str] = []
        here: FrameType | None = frame
        while here is not None:
            places.append(_place(here, here.f_lineno))
            here = here.f_back
        found.append(_group(names.get(ident, str(ident)), places[::-1], []))
    return _joined(found)


def _group(name: str, places: Sequence[str], children: list[_Group]) -> _Group:
    stack = _shortened(places)
    # The number of children is part of the shape.
    shape = "\n".join((*stack, *(f"{len(child.names)} {child.shape}" for child in children)))
    return _Group(shape, stack, children, [name])


def _joined(groups: list[_Group]) -> list[_Group]:
    found: dict[str, _Group] = {}
    # A nursery has its tasks in no order.
    for group in sorted(groups, key=lambda group: group.names[0]):
        if group.shape in found:
            found[group.shape].join(group)
        else:
            found[group.shape] = group
    return sorted(found.values(), key=lambda group: group.shape)


def _lines(group: _Group, indent: str, kind: str = "") -> Iterator[str]:
    more = len(group.names) - _NAMES
    yield f"{indent}{kind}{', '.join(group.names[:_NAMES])}{f' and {more} more' if more > 0 else ''}"
    for place in group.stack:
        yield f"{indent}    {place}"
    for child in group.children:
        yield from _lines(child, f"{indent}  ")


def _places_of(task: trio.lowlevel.Task) -> list[str]:
    try:
        return [
            place
            for frame, line in task.iter_await_frames()
            if not (place := _place(frame, line)).startswith("trio/_core/")
        ]
    except RuntimeError as error:
        # It awaits an object whose frames Trio can't read.
        return [f"? ({error})"]


def _shortened(places: Sequence[str]) -> tuple[str, ...]:
    if len(places) <= _MAX_FRAMES:
        return tuple(places)
    half = _MAX_FRAMES // 2
    return (*places[:half], f"… {len(places) - 2 * half} more", *places[-half:])


def _place(frame: FrameType, line: int) -> str:
    code = frame.f_code
    return f"{_short(code.co_filename)}:{line} {code.co_name}"


def _short(path: str) -> str:
    return path.rpartition("/site-packages/")[2].removeprefix(_HERE)
