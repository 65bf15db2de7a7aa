"""A local user: Python code that runs as `nobody` in a real process.

The tests need root to start a process of another user, and are skipped otherwise (`needs_root`).
"""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.processes import read_line

NOBODY = pwd.getpwnam("nobody")
_TIMEOUT_S = 60.0


def _python_for_everybody() -> str:
    """Returns an interpreter that any user may run: this one by its real name, or Debian's if it lies in a home."""
    own = Path(sys.executable).resolve()
    if all(path.stat().st_mode & stat.S_IXOTH for path in (own, *own.parents)):
        return str(own)
    return "/usr/bin/python3"


PYTHON = _python_for_everybody()
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of another user")


def run_code(code: str, *arguments: object) -> str:
    """Runs `code` as nobody to its end and returns what it printed; `arguments` are its `sys.argv[1:]`.

    Raises CalledProcessError when it exits with another status than 0.
    """
    done: subprocess.CompletedProcess[str] = subprocess.run(
        _command(code, arguments),
        **_AS_NOBODY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
    )
    return done.stdout


@contextmanager
def running_code(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Starts a process of `nobody` in its own session and waits for a line. Kills it at the end of the block."""
    with running(_command(code, arguments), **_AS_NOBODY, stdin=subprocess.DEVNULL) as process:
        yield process


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Starts a process in its own session and waits for a line. Kills it at the end of the block."""
    with subprocess.Popen(command, **options, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            read_line(process, _TIMEOUT_S)
            yield process
        finally:
            process.kill()


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Creates a directory as `nobody`."""
    run_code("import os, sys; os.mkdir(sys.argv[1]); os.chmod(sys.argv[1], int(sys.argv[2]))", path, mode)


def make_link(path: Path, target: Path) -> None:
    """Creates a symbolic link as `nobody`."""
    run_code("import os, sys; os.symlink(sys.argv[2], sys.argv[1])", path, target)


_AS_NOBODY: dict[str, Any] = {
    "user": NOBODY.pw_uid,
    "group": NOBODY.pw_gid,
    "extra_groups": (),
    "cwd": "/",
    "umask": 0,
    "env": {},
}


def _command(code: str, arguments: tuple[object, ...]) -> list[str]:
    return [PYTHON, "-I", "-c", code, *map(str, arguments)]
