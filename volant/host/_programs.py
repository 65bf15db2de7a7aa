"""Other programs that several rooms run, and their environment."""

from __future__ import annotations

from pathlib import Path

import trio

from ._host import Host

PROGRAM_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class CopyFailed(Exception):
    """A file was not copied. The text is for people."""


async def copy_sparsely(host: Host, source: Path, target: Path, timeout_s: float) -> None:
    """Copies a file without its pages of zeros, by a process of its own, as that has a lot to read.

    :raises CopyFailed: :raises OSError:
    """
    part = target.with_name(f"{target.name}.part")
    command = ["cp", "--sparse=always", "--", str(source), str(part)]
    try:
        status, output = await host.processes.run(
            command, env=PROGRAM_ENVIRONMENT, cwd=target.parent, timeout_s=timeout_s
        )
    except trio.TooSlowError:
        raise CopyFailed(f"it took more than {timeout_s:g} s") from None
    if status != 0:
        raise CopyFailed(output.decode(errors="replace")[-300:])
    await host.files.put_in_place(part, target)
