"""Reads files of Debian packages without unpacking them."""

from __future__ import annotations

import contextlib
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ._errors import ImageError

_MAX_LINKS = 8
_MAX_FILE_BYTES = 256 * 1024 * 1024


def read_files(deb: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Returns the content of the regular files whose paths are `wanted`, by relative path.

    Follows links to files of the same package. Writes nothing to the disk.

    :raises ImageError: the package can't be read
    """
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    with tar_stream(deb) as archive:
        for member in archive:
            path = member.name.removeprefix("./").strip("/")
            if not path or not wanted(path):
                continue
            if member.isfile():
                if member.size > _MAX_FILE_BYTES:
                    raise ImageError("bad_package", f"{deb.name} holds a file of {member.size} bytes: {path}")
                handle = archive.extractfile(member)
                files[path] = handle.read() if handle else b""
            elif member.issym():
                links[path] = _join(path, member.linkname)
            elif member.islnk():
                links[path] = member.linkname.removeprefix("./").strip("/")
    for path, target in links.items():
        for _ in range(_MAX_LINKS):
            if target not in links:
                break
            target = links[target]
        if target in files:
            files[path] = files[target]
    return dict(sorted(files.items()))


def _join(path: str, target: str) -> str:
    if target.startswith("/"):
        return target.strip("/")
    parts = path.split("/")[:-1]
    for part in target.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


@contextlib.contextmanager
def tar_stream(deb: Path, part: str = "fsys") -> Iterator[tarfile.TarFile]:
    """Opens the files of a package, or its control files (`ctrl`), for a block that reads them in order.

    :raises ImageError: the package can't be read
    """
    try:
        process = subprocess.Popen(
            ["dpkg-deb", f"--{part}-tarfile", str(deb)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except FileNotFoundError:
        raise ImageError("no_dpkg", "There is no dpkg-deb on this host", "install the package dpkg") from None
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                yield archive
            while process.stdout.read(1 << 20):
                pass
        except (tarfile.TarError, EOFError) as error:
            process.kill()
            raise ImageError("bad_package", f"{deb.name} can't be read: {error}") from None
        except BaseException:
            process.kill()
            raise
        complaint = process.stderr.read(4096).decode(errors="replace").strip()
        if process.wait() != 0:
            raise ImageError("bad_package", f"{deb.name} can't be read: {complaint or 'dpkg-deb failed'}")
