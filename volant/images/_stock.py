"""Stock images: OCI images of Debian, Python and Node.js from Debian's packages, for hosts without a registry.

The packages are fetched and verified as those of the boot image, and unpacked with dpkg's database. No maintainer
script runs: `_arrange` makes what those of the base system make, so `apt`, `pip` and `npm` work in a VM with a network.
What is installed in the VM runs its own scripts there, as always.
"""

from __future__ import annotations

import re
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from . import _recipe, _sources
from ._dpkg_tree import Tree, in_order
from ._errors import ImageError
from ._oci_archive import write_archive
from ._packages import fetch_packages
from ._progress import Progress, silent

_ESSENTIAL = (
    *("base-files", "base-passwd", "bash", "bsdutils", "coreutils", "dash", "debianutils", "diffutils", "dpkg"),
    *("findutils", "grep", "gzip", "hostname", "init-system-helpers", "libc-bin", "ncurses-base", "ncurses-bin"),
    *("perl-base", "sed", "sysvinit-utils", "tar", "util-linux"),
)
"""Debian's essential packages, on which no package depends by name."""
_BASE = (*_ESSENTIAL, "apt", "ca-certificates", "debian-archive-keyring", "mount", "netbase", "passwd", "tzdata")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SHADOW = 42
_APT_UID = 42
_NOGROUP = 65534


class StockImage(msgspec.Struct, frozen=True, kw_only=True):
    """A recipe."""

    repository: str
    """Of the reference; the tag follows from the package `versioned_by`."""
    packages: tuple[str, ...]
    command: str
    """Started without a command of its own."""
    versioned_by: str = ""
    """Empty: the tag is Debian's version."""
    parts: int = 1
    """How many parts of that version are the tag."""
    links: dict[str, str] = {}


STOCK = {
    "debian": StockImage(repository="debian", packages=_BASE, command="bash"),
    "python": StockImage(
        repository="python",
        packages=(*_BASE, "python3", "python3-pip", "python3-venv"),
        command="python3",
        versioned_by="python3",
        parts=2,
        links={"usr/local/bin/python": "/usr/bin/python3"},
    ),
    "node": StockImage(repository="node", packages=(*_BASE, "nodejs", "npm"), command="node", versioned_by="nodejs"),
}
"""By name."""


class BuiltStock(msgspec.Struct, frozen=True):
    """An archive that was written."""

    reference: str
    """The name for it, below `localhost`."""
    digest: str
    size_bytes: int
    packages: int


def build_stock(
    name: str,
    target: Path,
    cache_dir: Path,
    *,
    progress: Callable[[Progress], None] = silent,
    mirror: str | None = None,
    security_mirror: str | None = None,
    keyring: Path | None = None,
    offline: bool = False,
) -> BuiltStock:
    """Writes an OCI archive with a stock image. Needs no root; blocks for some ten seconds.

    :param name: of `STOCK`
    :param target: the archive
    :param cache_dir: for packages
    :param mirror: as for `build`, also the other parameters
    :raises ImageError: the image can't be built
    """
    recipe = STOCK.get(name)
    if recipe is None:
        raise ImageError("unknown_image", f"There is no stock image {name!r}", f"one of {', '.join(STOCK)}")
    found = fetch_packages(
        cache_dir / name,
        recipe.packages,
        progress=progress,
        mirror=mirror,
        security_mirror=security_mirror,
        keyring=keyring,
        offline=offline,
    )
    sources = _sources.explicit_sources(mirror, security_mirror) if mirror else _sources.archive()
    debs = {package.name: file for package, file in found.items()}
    versions = {package.name: package.version for package in found}
    tag = ".".join(versions[recipe.versioned_by].split(".")[: recipe.parts]) if recipe.versioned_by else "13"
    reference = f"localhost/{recipe.repository}:{tag}"
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".stock-") as folder:
            layer, made = Path(folder) / "layer.tar", Path(folder) / "image.tar"
            newest = _write_layer(layer, in_order(debs, ("base-files", "base-passwd")), recipe, sources, progress)
            progress(Progress("write", "Writing the image"))
            config: dict[str, object] = {"Env": [f"PATH={_PATH}"], "Cmd": [recipe.command], "WorkingDir": "/"}
            digest = write_archive(made, layer, config, reference, newest)
            made.replace(target)
            return BuiltStock(reference, digest, target.stat().st_size, len(debs))
    except OSError as error:
        raise ImageError("io_error", f"The image can't be written: {error}", "check the disk") from error


def _write_layer(
    path: Path,
    debs: list[Path],
    recipe: StockImage,
    sources: list[_sources.Source],
    progress: Callable[[Progress], None],
) -> int:
    """Returns the time of the newest file of a package, which is that of the image."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        tree = Tree(out, wanted=_is_wanted, omitted=_is_omitted)
        for number, deb in enumerate(debs):
            progress(Progress("unpack", "Unpacking the packages", number, len(debs), "packages"))
            tree.unpack(deb)
        _arrange(tree, sources)
        for where, link in recipe.links.items():
            tree.add(where, link=link)
        tree.finish()
    return tree.newest


_PRESETS = "usr/share/base-files/"
_CERTIFICATES = "usr/share/ca-certificates/"
_USERS = "usr/share/base-passwd/"
_DOCUMENTS = "usr/share/doc/"
_LICENCE = re.compile(r"[^/]+/copyright\Z")
_NSS = "usr/share/libc-bin/nsswitch.conf"


def _is_wanted(path: str) -> bool:
    return path.startswith(("etc/", _PRESETS, _CERTIFICATES, _USERS)) or path == _NSS


def _is_omitted(path: str) -> bool:
    """Documentation and translations, as in other slim images; licences stay. pip may install packages in a VM."""
    if path.startswith(_DOCUMENTS):
        return "/" in (rest := path.removeprefix(_DOCUMENTS)) and not _LICENCE.match(rest)
    return path.startswith(
        ("usr/share/man/", "usr/share/info/", "usr/share/locale/", "usr/share/lintian/")
    ) or path.endswith("/EXTERNALLY-MANAGED")


_COMMON_PAM = {
    "auth": "auth [success=1 default=ignore] pam_unix.so nullok\nauth requisite pam_deny.so\n"
    "auth required pam_permit.so\n",
    "account": "account [success=1 new_authtok_reqd=done default=ignore] pam_unix.so\naccount requisite pam_deny.so\n"
    "account required pam_permit.so\n",
    "password": "password [success=1 default=ignore] pam_unix.so obscure yescrypt\npassword requisite pam_deny.so\n"
    "password required pam_permit.so\n",
    "session": "session [default=1] pam_permit.so\nsession requisite pam_deny.so\nsession required pam_permit.so\n"
    "session required pam_unix.so\n",
}
_ALTERNATIVES = {
    "awk": ("/usr/bin/awk", "/usr/bin/mawk", 5),
    "which": ("/usr/bin/which", "/usr/bin/which.debianutils", 0),
    "pager": ("/usr/bin/pager", "/usr/bin/more", 50),
}
"""Name: link, target, priority."""
_DPKG_OPTIONS = """\
# As in this image, packages bring no documentation and no translations.
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/man/*
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
path-exclude /usr/share/lintian/*
"""
_DIRECTORIES = {
    **dict.fromkeys(("mnt", "srv", "opt", "etc/opt", "var/opt", "media", "var/log/apt"), 0o755),
    **{f"usr/local/{name}": 0o755 for name in ("bin", "etc", "games", "include", "lib", "sbin", "share/man", "src")},
    **dict.fromkeys(("var/lib/apt/lists/partial", "var/cache/apt/archives/partial"), 0o700),
    "var/tmp": 0o1777,
    "tmp": 0o1777,
    "run/lock": 0o1777,
}


def _arrange(tree: Tree, sources: list[_sources.Source]) -> None:
    """Adds what the maintainer scripts of the base system make."""
    for path, mode in _DIRECTORIES.items():
        tree.add(f"{path}/", mode=mode)
    tree.add("var/mail/", mode=0o2775, group=8)
    for path, link in {
        "var/spool/mail": "../mail",
        "var/run": "/run",
        "var/lock": "/run/lock",
        "usr/local/man": "share/man",
        "etc/dpkg/origins/default": "debian",
        "etc/localtime": "/usr/share/zoneinfo/Etc/UTC",
        "etc/mtab": "/proc/self/mounts",
    }.items():
        tree.add(path, link=link)
    found = tree.found
    presets = {"root/.profile": "dot.profile", "root/.bashrc": "dot.bashrc", "etc/profile": "profile"}
    for path, preset in presets.items():
        tree.add(path, found[_PRESETS + preset])
    tree.add("etc/nsswitch.conf", found[_NSS])
    tree.add("etc/timezone", b"Etc/UTC\n")
    tree.add("etc/shells", b"/bin/sh\n/bin/bash\n/usr/bin/bash\n/bin/dash\n/usr/bin/dash\n")
    for name in ("wtmp", "btmp", "lastlog", "faillog"):
        tree.add(f"var/log/{name}", mode=0o660 if name == "btmp" else 0o664, group=43)
    _add_users(tree)
    for kind, text in _COMMON_PAM.items():
        tree.add(f"etc/pam.d/common-{kind}", text.encode())
    tree.add("etc/pam.d/common-session-noninteractive", _COMMON_PAM["session"].encode())
    for name, (where, leads_to, priority) in _ALTERNATIVES.items():
        tree.add(where.lstrip("/"), link=f"/etc/alternatives/{name}")
        tree.add(f"etc/alternatives/{name}", link=leads_to)
        tree.add(f"var/lib/dpkg/alternatives/{name}", f"auto\n{where}\n\n{leads_to}\n{priority}\n\n".encode())
    _add_certificates(tree)
    tree.add("etc/dpkg/dpkg.cfg.d/slim", _DPKG_OPTIONS.encode())
    tree.add("etc/apt/sources.list.d/debian.sources", _sources_file(sources))


def _add_users(tree: Tree) -> None:
    users = tree.found[f"{_USERS}passwd.master"].decode().replace(":*:", ":x:")
    users += f"_apt:x:{_APT_UID}:{_NOGROUP}::/nonexistent:/usr/sbin/nologin\n"
    groups = tree.found[f"{_USERS}group.master"].decode().replace(":*:", ":x:")
    tree.add("etc/passwd", users.encode())
    tree.add("etc/group", groups.encode())
    for path, table, rest in (("etc/shadow", users, "*:20000:0:99999:7:::"), ("etc/gshadow", groups, "*::")):
        names = [line.split(":")[0] for line in table.splitlines()]
        tree.add(path, "".join(f"{name}:{rest}\n" for name in names).encode(), mode=0o640, group=_SHADOW)


def _add_certificates(tree: Tree) -> None:
    """Adds the list of trusted authorities, and all of them in one file."""
    authorities = {path: data for path, data in sorted(tree.found.items()) if path.startswith(_CERTIFICATES)}
    names = [path.removeprefix(_CERTIFICATES) for path in authorities]
    tree.add("etc/ca-certificates.conf", "".join(f"{name}\n" for name in names).encode())
    tree.add("etc/ssl/certs/ca-certificates.crt", b"".join(data.rstrip() + b"\n" for data in authorities.values()))
    for name in names:
        link = f"/{_CERTIFICATES}{name}"
        tree.add(f"etc/ssl/certs/{name.rpartition('/')[2].removesuffix('.crt')}.pem", link=link)


def _sources_file(sources: list[_sources.Source]) -> bytes:
    """Returns apt's sources: those that the packages are from."""
    stanzas = [
        f"Types: deb\nURIs: {source.uri}\nSuites: {source.suite}\nComponents: {_recipe.COMPONENT}\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.pgp\n"
        for source in sources
    ]
    return "\n".join(stanzas).encode()
