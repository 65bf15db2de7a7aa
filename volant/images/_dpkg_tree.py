"""Unpacks Debian packages into one tar, with dpkg's database, as if they had been installed.

Nothing is unpacked on the disk and no maintainer script runs, so this needs no root and runs no code of a package. The
caller adds what the scripts would have made (`Tree.add`).
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ._debs import tar_stream
from ._errors import ImageError

_ALIASES = re.compile(r"^(bin|sbin|lib|lib64)/")
"""Links to the same names below `usr`."""
_DATABASE = "var/lib/dpkg"
_PACKAGE = re.compile(r"^Package: (\S+)$", re.MULTILINE)
_SAME = re.compile(r"^Multi-Arch: same$", re.MULTILINE)
_ARCHITECTURE = re.compile(r"^Architecture: (\S+)$", re.MULTILINE)
_INTEREST = re.compile(r"^interest(-noawait|-await)? (\S+)$", re.MULTILINE)


class Tree:
    """A tar that is being written. Each path is written once: the first one counts."""

    def __init__(self, out: tarfile.TarFile, *, wanted: Callable[[str], bool], omitted: Callable[[str], bool]) -> None:
        """
        :param wanted: the files whose content is kept in `found`
        :param omitted: the paths that are left out, although packages list them
        """
        self.found: dict[str, bytes] = {}
        self._out = out
        self._wanted = wanted
        self._omitted = omitted
        self._paths: set[str] = set()
        self._status: list[str] = []
        self._triggers: dict[str, list[str]] = {}
        self.newest = 0
        """The time of the newest file of all packages, in seconds since 1970. What `add` adds has it, too."""

    def unpack(self, deb: Path) -> None:
        """Adds the files of a package, and the package to the database. :raises ImageError: it can't be read"""
        listed = ["/."]
        with tar_stream(deb) as archive:
            for member in archive:
                path = _clean(member.name)
                if path:
                    listed.append(f"/{path}")
                    self._take(archive, member, _ALIASES.sub(r"usr/\1/", path))
        self._register(deb, listed)

    def add(self, path: str, data: bytes = b"", *, mode: int = 0o644, link: str = "", group: int = 0) -> None:
        """Adds a file, or a link; a path that ends with `/` is a directory. Keeps what is there already."""
        info = tarfile.TarInfo(path.rstrip("/"))
        if info.name in self._paths:
            return
        parent = info.name.rpartition("/")[0]
        if parent:
            self.add(f"{parent}/", mode=0o755)
        info.mode, info.gid, info.mtime = mode, group, self.newest
        if path.endswith("/"):
            info.type = tarfile.DIRTYPE
        elif link:
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, link, 0o777
        else:
            info.size = len(data)
        self._paths.add(info.name)
        self._out.addfile(info, io.BytesIO(data))

    def finish(self) -> None:
        """Writes the database."""
        self.add(f"{_DATABASE}/status", "\n".join(self._status).encode())
        self.add(f"{_DATABASE}/available")
        self.add(f"{_DATABASE}/arch-native", b"amd64\n")
        self.add(f"{_DATABASE}/info/format", b"1\n")
        for name, lines in sorted(self._triggers.items()):
            self.add(f"{_DATABASE}/triggers/{name}", "".join(f"{line}\n" for line in lines).encode())
        # Without it dpkg activates the triggers of all packages at its first run, which takes a minute in a VM.
        self.add(f"{_DATABASE}/triggers/Unincorp")
        self.add(f"{_DATABASE}/triggers/Lock", mode=0o600)
        self.add(f"{_DATABASE}/updates/")

    def _take(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        if path in self._paths or self._omitted(path):
            return
        self._paths.add(path)
        handle = archive.extractfile(member) if member.isreg() else None
        member.name, member.uname, member.gname = path, "", ""
        member.pax_headers = {}
        if member.islnk():
            member.linkname = _ALIASES.sub(r"usr/\1/", _clean(member.linkname))
        self.newest = max(self.newest, int(member.mtime))
        if handle is not None and self._wanted(path):
            self.found[path] = handle.read()
            self._out.addfile(member, io.BytesIO(self.found[path]))
        else:
            self._out.addfile(member, handle)

    def _register(self, deb: Path, listed: list[str]) -> None:
        """Adds a package to the database."""
        files: dict[str, tuple[bytes, int]] = {}
        with tar_stream(deb, "ctrl") as archive:
            for member in archive:
                handle = archive.extractfile(member) if member.isreg() else None
                if handle is not None:
                    files[_clean(member.name)] = handle.read(), member.mode
        control, _ = files.pop("control", (b"", 0))
        text = control.decode(errors="replace").strip()
        name, architecture = _PACKAGE.search(text), _ARCHITECTURE.search(text)
        if name is None or architecture is None:
            raise ImageError("bad_package", f"{deb.name} has no name or no architecture")
        stem = f"{name[1]}:{architecture[1]}" if _SAME.search(text) else name[1]
        text = text.replace(name[0], f"{name[0]}\nStatus: install ok installed", 1)
        conffiles = files.get("conffiles", (b"", 0))[0].decode().split("\n")
        sums = [f" {path} {self._sum(path)}" for path in conffiles if path.startswith("/")]
        if sums:
            text += "\n" + "\n".join(["Conffiles:", *sums])
        self._status.append(text + "\n")
        for kind, path in _INTEREST.findall(files.get("triggers", (b"", 0))[0].decode()):
            waits = "/noawait" if kind == "-noawait" else ""
            file, line = ("File", f"{path} ") if path.startswith("/") else (path, "")
            self._triggers.setdefault(file, []).append(f"{line}{name[1]}{waits}")
        self.add(f"{_DATABASE}/info/{stem}.list", "".join(f"{path}\n" for path in listed).encode())
        for file, (data, mode) in sorted(files.items()):
            self.add(f"{_DATABASE}/info/{stem}.{file}", data, mode=0o755 if mode & 0o100 else 0o644)

    def _sum(self, path: str) -> str:
        data = self.found.get(path.lstrip("/"))
        return "newconffile" if data is None else hashlib.md5(data, usedforsecurity=False).hexdigest()


def in_order(debs: Mapping[str, Path], first: Iterable[str]) -> list[Path]:
    """Returns the packages, those named `first` before the others: what they say of a directory counts."""
    names = [name for name in first if name in debs]
    return [debs[name] for name in [*names, *sorted(set(debs) - set(names))]]


def _clean(name: str) -> str:
    return name.removeprefix("./").strip("/")
