"""The job of the process that converts layers, and its result."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path

import msgspec

from volant.host import Sandbox, confine_self

from ._errors import OciError
from ._layers import PROGRAM_MEMORY, LayerJob, convert, join

_LIMITS = {
    resource.RLIMIT_AS: PROGRAM_MEMORY,
    resource.RLIMIT_NOFILE: 256,
}
"""Limits for this process and `mkfs.erofs`, which temporarily creates sparse files of any size."""
_AT_ONCE = 2
"""Maximum layers converted at the same time."""
_LOOK_S = 0.02
"""The interval of checks for arrived layers. skopeo renames a complete layer."""


class Confinement(msgspec.Struct, frozen=True):
    """The isolation of the process, as it reads untrusted data."""

    directory: str
    """Its working directory, in which it may create files."""
    landlock: bool
    read: tuple[str, ...] = ()
    """Files and directories that it may read."""
    write: tuple[str, ...] = ()
    """Files that it may write."""
    user: int | None = None
    """Its user and group; None for the daemon's."""
    groups: tuple[int, ...] = ()
    """Further groups."""


class ImageJob(msgspec.Struct, frozen=True):
    """The layers of an image that the cache lacks, and the join of all layers."""

    convert: tuple[LayerJob, ...]
    layers: tuple[str, ...]
    """Paths of the files of all layers, lowest first."""
    correcting: str
    """The path of the file for one more layer, above the others."""
    metadata: str
    """The path of the file that joins the layers."""
    arrived: str = "/"
    """The path of a file that exists once all layers have arrived. By default it exists."""
    confinement: Confinement | None = None
    """None for no isolation."""
    daemon: int | None = None
    """The process that waits for this one. When it ends, missing layers can't arrive any more."""


class Failure(msgspec.Struct, frozen=True):
    """The reason of a failed job, as an `OciError`."""

    code: str
    message: str
    hint: str


def confine(confinement: Confinement) -> None:
    """Confines this process permanently to the files of its job, without network and with limits.

    :raises OciError: it is not possible
    """
    place = Path(confinement.directory)
    sandbox = Sandbox(
        user=confinement.user,
        groups=confinement.groups,
        landlock=confinement.landlock,
        # For modules that are not loaded yet.
        read=(Path(sys.prefix), Path(sys.base_prefix), *map(Path, confinement.read)),
        write=tuple(map(Path, confinement.write)),
        make=(place,),
        no_connect=True,
    )
    try:
        for limit, value in _LIMITS.items():
            resource.setrlimit(limit, (value, value))
        confine_self(sandbox, place)
    except (OSError, ValueError) as error:
        raise OciError(
            "sandbox_failed", f"the process that converts layers can't be confined: {error}",
            "see the sandbox in `volar setup --check`, or turn it off with VOLANT_SANDBOX=off",
        ) from error  # fmt: skip


def run(job: ImageJob) -> None:
    """Runs a job, while layers still arrive.

    :raises OciError: see `convert`; or the daemon was killed, so nothing arrives any more
    :raises OSError: the disk fails
    """
    # Skopeo fetches several layers at once, so the first to arrive is the first to be converted.
    missing, failures = list(job.convert), list[BaseException]()
    lock = threading.Lock()

    def take() -> LayerJob | None:
        """Returns a layer that has arrived; None if all are taken."""
        while missing and not failures:
            with lock:
                are_all_here = Path(job.arrived).exists()
                # One that has not arrived by then never will, and is an error.
                for layer in list(missing):
                    if are_all_here or Path(layer.blob).exists():
                        missing.remove(layer)
                        return layer
            if job.daemon is not None and os.getppid() != job.daemon:
                raise OciError("fetch_interrupted", "the daemon that fetches has ended", "try again")
            time.sleep(_LOOK_S)
        return None

    def work() -> None:
        try:
            while (layer := take()) is not None:
                convert(layer)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    join(job.layers, Path(job.correcting), Path(job.metadata))


def check_end(status: int, output: bytes) -> None:
    """Reads the result of the process. :raises OciError: it failed."""
    last = output.strip().rpartition(b"\n")[2]
    if status == 0 and last == b"{}":
        return
    try:
        failure = msgspec.json.decode(last, type=Failure)
    except msgspec.MsgspecError:
        said = last.decode(errors="replace")[:300] or f"status {status}"
        raise OciError("io_error", f"the process that converts layers died: {said}", "check memory and disk") from None
    raise OciError(failure.code, failure.message, failure.hint)
