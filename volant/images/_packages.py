"""Debian packages in a cache folder: resolved and fetched by the private apt, verified on every use.

debs/, packages.json      the packages of the last build, to build without a network
apt/                      the private apt's state
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from volant.store import write_atomically

from . import _apt, _sources, _store
from ._errors import ImageError
from ._progress import WAITING, Progress, silent


class Archive(NamedTuple):
    """Where packages come from, and the keys that must have signed them; None: what this host uses."""

    mirror: str | None
    security_mirror: str | None
    keyring: Path | None


def fetch_packages(
    cache_dir: Path,
    names: Iterable[str],
    *,
    without: Iterable[str] = (),
    progress: Callable[[Progress], None] = silent,
    mirror: str | None = None,
    security_mirror: str | None = None,
    keyring: Path | None = None,
    offline: bool = False,
) -> dict[_apt.Package, Path]:
    """Returns packages and all their dependencies (not recommendations), each with its verified file, sorted by name.

    For scripts that make root filesystems. If the mirror can't be reached, it returns the packages of the last call. Of
    several callers one fetches, the others wait.

    :param cache_dir: the only folder that is written to; not that of `build`
    :param names: the packages
    :param without: packages to leave out, with the dependencies that only they need
    :param mirror: the address of a Debian mirror, instead of this host's apt sources
    :param security_mirror: the address of the security archive, with `mirror`; without it there are no security updates
    :param keyring: the keys that must have signed the archive; default: this host's keyring of the Debian archive
    :param offline: return the packages of the last call, without the network
    :raises ImageError: the packages can't be fetched
    """
    wanted, given = sorted(set(names)), sorted(set(without))
    cache_dir = cache_dir.absolute()
    with _store.building(cache_dir, lambda: progress(WAITING)) as scratch:
        archive = None if offline else Archive(mirror, security_mirror, keyring)
        packages, apt = resolve(cache_dir, lambda apt: apt.resolve_with_dependencies(wanted, given), progress, archive)
        lacking = set(wanted) - {package.name for package in packages}
        if lacking:
            raise ImageError(
                "offline",
                f"The packages of the last build lack {', '.join(sorted(lacking))}, and the archive was not asked",
                "try again with a network",
            )
        folder = fetch(cache_dir, scratch, packages, apt, progress)
        return {package: folder / package.filename for package in packages}


def resolve(
    cache_dir: Path,
    choose: Callable[[_apt.Apt], list[_apt.Package]],
    progress: Callable[[Progress], None],
    archive: Archive | None,
) -> tuple[list[_apt.Package], _apt.Apt | None]:
    """Returns the packages that `choose` takes from the archive, or the last ones if there is none or it can't be
    reached. The caller holds the lock.

    :raises ImageError: there are neither
    """
    if archive is None:
        return _last(cache_dir), None
    mirror, security_mirror, keyring = archive
    if keyring is not None and not keyring.is_file():
        raise ImageError("no_keyring", f"There is no keyring {keyring}", "name one that exists with --keyring FILE")
    sources = _sources.explicit_sources(mirror, security_mirror) if mirror else _sources.archive()
    apt = _apt.Apt(cache_dir / "apt", sources, (keyring or _sources.find_keyring()).absolute())
    progress(Progress("update", "Asking the Debian archive for its packages"))
    try:
        apt.update()
    except ImageError as error:
        cached = _load(cache_dir)
        if error.code != "unreachable" or cached is None:
            raise
        progress(Progress("resolve", f"{error.message}: taking the packages of the last build"))
        return cached, apt
    progress(Progress("resolve", "Choosing the versions"))
    return choose(apt), apt


def _last(cache_dir: Path) -> list[_apt.Package]:
    """Returns the packages of the last build. :raises ImageError: there was none."""
    packages = _load(cache_dir)
    if packages is None:
        raise ImageError("offline", "No earlier build left its packages in this cache", "build without --offline once")
    return packages


def _load(cache_dir: Path) -> list[_apt.Package] | None:
    try:
        return _apt.load_list((cache_dir / "packages.json").read_text())
    except (OSError, ValueError):
        return None


def fetch(
    cache_dir: Path,
    scratch: Path,
    packages: list[_apt.Package],
    apt: _apt.Apt | None,
    progress: Callable[[Progress], None],
) -> Path:
    """Returns the folder with all packages, each verified now. The caller holds the lock."""
    debs = cache_dir / "debs"
    debs.mkdir(exist_ok=True)
    missing = [item for item in packages if not _apt.verify(item, debs / item.filename)]
    total = sum(item.size for item in packages)
    had = total - sum(item.size for item in missing)
    if missing:
        if apt is None:
            raise ImageError(
                "offline",
                f"The cache lacks {', '.join(item.name for item in missing)}",
                "build without --offline once",
            )
        incoming = scratch / "incoming"
        incoming.mkdir()

        def arrived(count: int) -> None:
            progress(Progress("download", "Fetching packages", min(total, had + count), total, "bytes"))

        arrived(0)
        apt.download(missing, incoming, arrived)
        for item in missing:
            if not _apt.verify(item, incoming / item.filename):
                raise ImageError("untrusted", f"{item.filename} is not what the archive's index says", "try again")
            (incoming / item.filename).replace(debs / item.filename)
    progress(Progress("download", "All packages are there", total, total, "bytes"))
    write_atomically(
        cache_dir / "packages.json", json.dumps(_apt.dump_list(packages), indent=1).encode() + b"\n", mode=0o644
    )
    keep = {item.filename for item in packages}
    for path in debs.iterdir():
        if path.name not in keep:
            path.unlink(missing_ok=True)
    return debs
