"""Real time, randomness, threads and I/O are errors in a simulation.

They would not break the run, but the next one would differ for no visible reason. So the guard detects them where they
happen, and the error names the place. It has two mechanisms:

- **Calls** that read a clock or a random number raise no audit event. From Python 3.12 on `sys.monitoring` shows each
  call of Python code, under whatever name it imported the function. It skips a place that was harmless once, so it
  costs next to nothing. On 3.11 `sys.setprofile` shows the same, and a run takes four to six times as long.
- **Audit hooks** see files, sockets, processes, threads and `time.sleep`. Nothing removes a hook, so the first
  simulation installs it, and it does nothing outside of simulations.

Rejected: replacing `time.time` and the like in their modules. `from time import monotonic`, a default argument or a
stored `clock=time.monotonic` keep the original, `datetime` cannot be replaced, and all other code in the process sees
the replacement. Not seen: a function that C code calls, such as `functools.partial(time.time)()`;
`check_deterministic` finds the consequences.

The standard library may read clocks for itself (logging stamps its records), and so may Trio and pytest; Python may
open files to import a module or to print a traceback.
"""

from __future__ import annotations

import _thread
import datetime
import os
import random
import select
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FrameType
from typing import Any, Final, Literal, TypeAlias, get_args

import trio

from ._errors import RealWorld

Kind: TypeAlias = Literal["time", "randomness", "threads", "processes", "network", "files"]
"""The kinds of real actions that `allow_real` allows."""

_INSTEAD: Final[dict[Kind, str]] = {
    "time": "Use trio.current_time() and trio.sleep(), or pass a wall clock in from outside",
    "randomness": "Use the simulation's own `sim.rng`, passed in from outside (open_system takes it as `rng`)",
    "threads": "Virtual time does not wait for threads. Pass the work in from outside, so that a test can do it inline",
    "processes": "Virtual time does not wait for processes. Put them behind an interface that a test can implement",
    "network": "Virtual time does not wait for sockets. Put them behind an interface that a test can implement",
    "files": "Put files behind an interface that a test can implement, or read them before the simulation",
}

_CLOCKS: Final = "time monotonic perf_counter process_time thread_time"


def _reads() -> dict[Any, Kind]:
    found: dict[Any, Kind] = {}
    for name in _CLOCKS.split():
        for suffix in ("", "_ns"):
            found[getattr(time, name + suffix)] = "time"
    today = (datetime.datetime.now, datetime.datetime.utcnow, datetime.datetime.today, datetime.date.today)
    # From 3.12 on sleep() and start_new_thread() raise audit events of their own.
    for function in (*today, getattr(time, "clock_gettime", None), select.select, time.sleep):
        found[function] = "time"
    for function in (os.urandom, getattr(os, "getrandom", None)):
        found[function] = "randomness"
    found[_thread.start_new_thread] = "threads"
    found.pop(None, None)
    return found


_READS: Final = _reads()
"""Functions in C that read a clock, wait for one, read a random number or start a thread."""
_SHARED_RANDOM: Final[Any] = random.random.__self__  # type: ignore[attr-defined]  # a bound method of the shared Random
_NAMES: Final = {read.__name__ for read in _READS} | {name for name in dir(random.Random) if not name.startswith("_")}

_AUDITED: Final[dict[str, Kind]] = {
    "time.sleep": "time",
    "_thread.start_new_thread": "threads",
    "_thread.start_joinable_thread": "threads",
    **dict.fromkeys(["subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.forkpty"], "processes"),
    **dict.fromkeys(
        ["socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"], "network"
    ),
    **dict.fromkeys(
        ["open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "sqlite3.connect"],
        "files",
    ),
}

_STDLIB: Final = tuple(
    {
        sysconfig.get_path("stdlib") + os.sep,
        sysconfig.get_path("platstdlib") + os.sep,
        str(Path(os.__file__).parent) + os.sep,
    }
)
_PACKAGES: Final = (
    "trio",
    "outcome",
    "sortedcontainers",
    "attr",
    "_pytest",
    "pytest",
    "pluggy",
    "coverage",
    "hypothesis",
)
_HERE: Final = str(Path(__file__).parent) + os.sep
_RUNTIME: Final = str(Path(__file__).parent.parent) + os.sep
_OWN: Final = "importlib linecache.py tokenize.py traceback.py inspect.py warnings.py logging pdb.py bdb.py cmd.py"
_OWN_FILES: Final = (
    "<frozen importlib",
    "<frozen zipimport",
    *(str(Path(os.__file__).parent / name) for name in _OWN.split()),
)
"""Python's own use of files: importing, printing tracebacks, logging, debugging."""

_allowed: ContextVar[frozenset[Kind]] = ContextVar("actors.testing.allowed", default=frozenset())


@lru_cache(1)
def _internal_directories() -> tuple[str, ...]:
    found = []
    for package in _PACKAGES:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            found.append(str(Path(spec.origin).parent) + os.sep)
    return tuple(found)


@lru_cache(4096)
def is_internal(filename: str) -> bool:
    """Returns whether a file belongs to the standard library, the runtime, or the test runner."""
    if filename.startswith(("<frozen", "<attrs generated", _RUNTIME, *_internal_directories())):
        return True
    return filename.startswith(_STDLIB) and "site-packages" not in filename and "dist-packages" not in filename


def _culprit(frame: FrameType | None) -> FrameType | None:
    """Returns the innermost frame of the program; None when Python or the test runner acts for itself."""
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename.startswith(_HERE) or filename.startswith(_OWN_FILES):
            return None
        if not is_internal(filename):
            break
        frame = frame.f_back
    culprit = frame
    while frame is not None and not frame.f_code.co_filename.startswith(_HERE):
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return None
        frame = frame.f_back
    return culprit


def _in_a_file(frame: FrameType) -> FrameType:
    """Returns the frame; for generated code (the `__init__` of a dataclass), its caller."""
    outer: FrameType | None = frame
    while outer is not None and outer.f_code.co_filename.startswith("<"):
        outer = outer.f_back
    return frame if outer is None or outer.f_code.co_filename.startswith(_HERE) else outer


class Guard:
    """Watches one thread during `watching`. Each violation goes to `violated` before it is raised."""

    def __init__(self, violated: Callable[[RealWorld], None], hold_clock: Callable[[bool], None]) -> None:
        self._violated = violated
        self._thread = threading.get_ident()
        self.hold_clock = hold_clock

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the thread during the block. :raises RuntimeError: a simulation already runs in this process."""
        global _active
        if _active is not None:
            raise RuntimeError("a simulation runs already, and one process can only hold one at a time")
        _install_audit_hook()
        starts = _start_checks()
        _active = self
        try:
            with _watch_calls(self, starts):
                yield
        finally:
            _active = None

    def audited(self, event: str, args: tuple[Any, ...]) -> None:
        kind = _AUDITED[event]
        if kind in _allowed.get() or threading.get_ident() != self._thread:
            return
        detail = f"{event}({args[0]!r})" if args and isinstance(args[0], str) else event
        self.check(kind, detail, sys._getframe(2))

    def called(self, caller: FrameType, function: Any, kind: Kind) -> None:
        if kind in _allowed.get() or threading.get_ident() != self._thread:
            return
        if kind == "time" and is_internal(caller.f_code.co_filename):
            return
        module = getattr(function, "__module__", None) or getattr(function.__self__, "__module__", None) or "random"
        owner = function.__self__.__name__ + "." if isinstance(getattr(function, "__self__", None), type) else ""
        self.check(kind, f"{module}.{owner}{function.__name__}()", caller)

    def started(self, frame: FrameType, check: _StartCheck) -> None:
        kind, what, applies = check
        if kind in _allowed.get() or threading.get_ident() != self._thread or not applies(frame):
            return
        self.check(kind, what, frame.f_back)

    def check(self, kind: Kind, what: str, frame: FrameType | None) -> None:
        """Checks a call. :raises RealWorld: unless Python, Trio or the test runner acts for itself."""
        culprit = _culprit(frame)
        if culprit is None:
            return
        culprit = _in_a_file(culprit)
        code = culprit.f_code
        error = RealWorld(
            f"{what} is real: no seed decides it.\n"
            f"  at {code.co_filename}:{culprit.f_lineno} in {code.co_qualname}\n"
            f"{_INSTEAD[kind]}. To allow it: `with allow_real({kind!r}):`"
        )
        self._violated(error)
        raise error


_active: Guard | None = None
_hooked = False


@contextmanager
def allow_real(*kinds: Kind) -> Iterator[None]:
    """Allows these kinds of real actions in a simulation, during the block.

    The seed alone then no longer decides the run: only use it for actions that make no difference, such as reading a
    file that never changes. Virtual time does not advance during the block; don't sleep in it. It has no effect outside
    a simulation.

    :raises ValueError: no kind is named, or an unknown one.
    """
    known = get_args(Kind)
    if not kinds or not set(kinds) <= set(known):
        raise ValueError(
            f"allow_real() takes some of {', '.join(known)}, not {', '.join(map(repr, kinds)) or 'nothing'}"
        )
    guard = _active if _active is not None and threading.get_ident() == _active._thread else None
    token = _allowed.set(_allowed.get() | set(kinds))
    if guard is not None:
        guard.hold_clock(True)
    try:
        yield
    finally:
        _allowed.reset(token)
        if guard is not None:
            guard.hold_clock(False)


def _install_audit_hook() -> None:
    global _hooked
    if _hooked:
        return
    _hooked = True
    audited = _AUDITED

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if _active is not None and event in audited:
            _active.audited(event, args)

    sys.addaudithook(hook)


_StartCheck: TypeAlias = tuple[Kind, str, Callable[[FrameType], bool]]


def _start_checks() -> dict[CodeType, _StartCheck]:
    """Returns checks for functions in Python, by their code. Each runs at the start of its function."""

    def always(frame: FrameType) -> bool:
        return True

    def unseeded(frame: FrameType) -> bool:
        return frame.f_locals.get("x") is None

    functions: list[tuple[Any, Kind, str, Callable[[FrameType], bool]]] = [
        (trio.to_thread.run_sync, "threads", "trio.to_thread.run_sync()", always),
        (trio.lowlevel.wait_readable, "network", "waiting until a file descriptor is readable", always),
        (trio.lowlevel.wait_writable, "network", "waiting until a file descriptor is writable", always),
        (random.Random.__init__, "randomness", "random.Random() without a seed", unseeded),
        (uuid.uuid1, "randomness", "uuid.uuid1()", always),
        (uuid.getnode, "randomness", "uuid.getnode()", always),
    ]
    return {function.__code__: (kind, what, applies) for function, kind, what, applies in functions}


if sys.version_info >= (3, 12):
    _monitoring = sys.monitoring

    @contextmanager
    def _watch_calls(guard: Guard, starts: dict[CodeType, _StartCheck]) -> Iterator[None]:
        tool = next((n for n in (4, 3, 5, 2) if _monitoring.get_tool(n) is None), None)
        if tool is None:
            raise RuntimeError("sys.monitoring has no free tool id for the simulation")
        disable = _monitoring.DISABLE
        by_name = _NAMES
        shared = _SHARED_RANDOM

        def on_call(code: CodeType, offset: int, function: Any, arg0: Any) -> Any:
            if getattr(function, "__name__", None) not in by_name:
                return disable
            kind = _READS.get(function) if type(function) is BuiltinFunctionType else None
            if is_internal(code.co_filename) and kind in (None, "time"):
                return disable
            if arg0 is shared or getattr(function, "__self__", None) is shared:
                guard.called(sys._getframe(1), function, "randomness")
            elif kind is not None:
                guard.called(sys._getframe(1), function, kind)
            return None

        def on_start(code: CodeType, offset: int) -> Any:
            check = starts.get(code)
            if check is not None:
                guard.started(sys._getframe(1), check)

        events = _monitoring.events
        _monitoring.use_tool_id(tool, "actors.testing")
        try:
            _monitoring.register_callback(tool, events.CALL, on_call)
            _monitoring.register_callback(tool, events.PY_START, on_start)
            for code in starts:
                _monitoring.set_local_events(tool, code, events.PY_START)
            _monitoring.restart_events()
            _monitoring.set_events(tool, events.CALL)
            yield
        finally:
            _monitoring.set_events(tool, 0)
            for code in starts:
                _monitoring.set_local_events(tool, code, 0)
            _monitoring.register_callback(tool, events.CALL, None)
            _monitoring.register_callback(tool, events.PY_START, None)
            _monitoring.free_tool_id(tool)

else:

    @contextmanager
    def _watch_calls(guard: Guard, starts: dict[CodeType, _StartCheck]) -> Iterator[None]:
        reads = dict(_READS)
        for method in (_SHARED_RANDOM.random, _SHARED_RANDOM.getrandbits):
            reads[method] = "randomness"
        by_name = {code.co_name for code in starts}
        by_id = {id(code): check for code, check in starts.items()}

        def profile(frame: FrameType, event: str, arg: Any) -> None:
            if event == "c_call":
                if arg in reads:
                    guard.called(frame, arg, reads[arg])
            elif event == "call" and frame.f_code.co_name in by_name:
                check = by_id.get(id(frame.f_code))
                if check is not None:
                    guard.started(frame, check)

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(before)
