"""Debian packages in a cache folder, fetched and verified by mmdebstrap's apt.

    packages/archives/        the packages of the last build, to build without a network
    packages/lists/           the archive's index, which they are of
    packages/packages.json    the packages with their SHA-256, and the mirrors

apt verifies the archive's signature, the index files against it, and each package against those. The SHA-256 is
computed then, and checked again on every use, however old the cache is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from volant.store import read_record, write_atomically

from . import _mmdebstrap, _sources, _store
from ._errors import ImageError
from ._mmdebstrap import Bootstrap
from ._progress import WAITING, Progress, silent


class Package(msgspec.Struct, frozen=True, order=True):
    """A package that an image is made of."""

    name: str
    version: str
    architecture: str
    sha256: str
    size: int
    filename: str
    """Its name in the cache: `name_version_architecture.deb`."""


class Archive(msgspec.Struct, frozen=True):
    """Where packages come from, and the keys that must have signed them. With None, this host's own are used."""

    mirror: str | None = None
    """The address of a Debian mirror."""
    security_mirror: str | None = None
    """The address of the security archive, with `mirror`; without it there are no security updates."""
    keyring: Path | None = None
    offline: bool = False
    """Whether the packages of the last build are used, without the network."""


THIS_HOST = Archive()


class Cached(msgspec.Struct, frozen=True):
    """The packages that the last build left in the cache, and where they came from."""

    sources: list[str]
    """Lines of apt's sources."""
    keys: str
    """The SHA-256 of the keyring."""
    packages: list[Package]


def extract_packages(
    cache_dir: Path,
    names: Iterable[str],
    target: Path,
    *,
    without: Iterable[str] = (),
    archive: Archive = THIS_HOST,
    progress: Callable[[Progress], None] = silent,
) -> list[Package]:
    """Unpacks packages and all their dependencies (not recommendations) to a folder; returns them, sorted by name.

    For scripts that make root filesystems. It runs no script of a package and needs no root. If the mirror can't be
    reached, it unpacks the packages of the last call. Of several callers one works, the others wait.

    :param cache_dir: a folder for packages, not that of `build`
    :param target: the folder, which must not exist
    :param without: packages to leave out, with the dependencies that only they need
    :raises ImageError: the packages can't be fetched or unpacked
    """
    bootstrap = Bootstrap(variant="extract", include=sorted(set(names)), without=sorted(set(without)))
    cache_dir = cache_dir.absolute()
    with _store.building(cache_dir, lambda: progress(WAITING)) as scratch:
        return make(bootstrap, target.absolute(), cache_dir, scratch, archive, progress)


def make(
    bootstrap: Bootstrap,
    target: Path,
    cache_dir: Path,
    scratch: Path,
    archive: Archive,
    progress: Callable[[Progress], None],
) -> list[Package]:
    """Makes a tree or a tar of the archive's packages, or of the last ones if the archive can't be reached.

    Returns the packages, sorted by name. The caller holds the lock.

    :param target: a folder that does not exist, or a file that ends with `.tar`
    :param scratch: a folder for temporary files
    :raises ImageError: it fails
    """
    if archive.offline:
        return _make(bootstrap, target, cache_dir, scratch, last(cache_dir), None, progress)
    if archive.keyring is not None and not archive.keyring.is_file():
        text = f"There is no keyring {archive.keyring}"
        raise ImageError("no_keyring", text, "name one that exists with --keyring FILE")
    keyring = (archive.keyring or _sources.find_keyring()).read_bytes()
    sources = _sources.host_sources()
    if archive.mirror:
        sources = _sources.explicit_sources(archive.mirror, archive.security_mirror)
    keys = hashlib.sha256(keyring).hexdigest()
    cached = _load(cache_dir)
    # apt compares only the size of a package that it has, so what other keys have signed must not count.
    usable = cached.packages if cached is not None and cached.keys == keys else []
    progress(Progress("update", "Asking the Debian archive for its packages"))
    try:
        return _make(bootstrap, target, cache_dir, scratch, Cached(sources, keys, usable), keyring, progress)
    except ImageError as error:
        if error.code != "unreachable" or not usable:
            raise
        progress(Progress("resolve", f"{error.message}: taking the packages of the last build"))
    shutil.rmtree(target, ignore_errors=True)
    return _make(bootstrap, target, cache_dir, scratch, last(cache_dir), None, progress)


def _make(
    bootstrap: Bootstrap,
    target: Path,
    cache_dir: Path,
    scratch: Path,
    given: Cached,
    keyring: bytes | None,
    progress: Callable[[Progress], None],
) -> list[Package]:
    """
    :param given: the packages in the cache that may be used, and the sources of others
    :param keyring: the keys of the archive; None to use only packages in the cache
    """
    made = scratch / "packages"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    work = _work_folder(scratch, own_files=bootstrap.variant == "extract")
    try:
        _prepare(work, cache_dir / "packages", given.packages, keyring)
        _mmdebstrap.run(bootstrap, target, work, made, given.sources, progress, offline=keyring is None)
    except ImageError as error:
        if keyring is None and error.code in ("unreachable", "unresolved"):
            text = f"The packages of the last build do not suffice. {error.message}"
            raise ImageError("offline", text, "build without --offline once") from None
        raise
    finally:
        _mmdebstrap.remove_tree(work)
    (made / "used").rename(made / "archives")
    record = Cached(given.sources, given.keys, sorted(map(_package, (made / "archives").iterdir())))
    write_atomically(made / "packages.json", msgspec.json.format(msgspec.json.encode(record)), mode=0o644)
    if (cache_dir / "packages").exists():
        (cache_dir / "packages").rename(scratch / "former-packages")
    made.rename(cache_dir / "packages")
    return record.packages


def _work_folder(scratch: Path, *, own_files: bool) -> Path:
    """Returns a new folder for mmdebstrap's files. All users reach it if subordinate IDs of this one may own some of
    the files, and the scratch folder has a link to it then."""
    here = scratch / "work"
    if own_files or os.geteuid() == 0:
        here.mkdir()
        return here
    wanted = Path(os.environ.get("TMPDIR", "/var/tmp"))
    reached = all(each.stat().st_mode & 0o001 for each in (wanted, *wanted.parents))
    made = Path(tempfile.mkdtemp(prefix="volant-", dir=wanted if reached else "/var/tmp"))
    # Nobody else can list it: apt's settings in there may have a password.
    made.chmod(0o711)
    here.unlink(missing_ok=True)
    here.symlink_to(made)
    return made


def _prepare(work: Path, folder: Path, packages: Iterable[Package], keyring: bytes | None) -> None:
    """Fills a work folder with the keys, and with the index and the unchanged packages of a folder."""
    archives, lists = work / "packages" / "archives", work / "packages" / "lists"
    for path in (work / "keys", archives, lists):
        path.mkdir(parents=True)
    if keyring is not None:
        # apt goes by the name.
        name = "archive.asc" if keyring.startswith(b"-----BEGIN") else "archive.gpg"
        (work / "keys" / name).write_bytes(keyring)
    if packages:
        shutil.copytree(folder / "lists", lists, dirs_exist_ok=True)
    lacking = []
    for package in packages:
        path = folder / "archives" / package.filename
        if path.is_file() and _package(path) == package:
            shutil.copy2(path, archives)
        else:
            lacking.append(package.name)
    if keyring is None and lacking:
        raise ImageError("offline", f"The cache lacks {', '.join(lacking)}", "build without --offline once")
    for path in work.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def last(cache_dir: Path) -> Cached:
    """Returns the packages that the last build left in the cache. :raises ImageError: there was none"""
    cached = _load(cache_dir)
    if cached is None:
        raise ImageError("offline", "No earlier build left its packages in this cache", "build without --offline once")
    return cached


def _load(cache_dir: Path) -> Cached | None:
    return read_record(cache_dir / "packages" / "packages.json", Cached)


def _package(path: Path) -> Package:
    """Returns the package in a file that apt has fetched."""
    name, version, architecture = path.name.removesuffix(".deb").split("_")
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    # File names have %3a for the colon of an epoch.
    return Package(name, version.replace("%3a", ":"), architecture, digest, path.stat().st_size, path.name)
