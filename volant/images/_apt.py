"""A private apt: the host's program and Debian's keys, with state, cache and settings of our own.

apt verifies the archive's signature, the index files against it, and each package against those. The list of packages
has their SHA-256, and `verify` checks it again on every use, however old the cache is.

The boot image does not use the dependency solver: the recipe names each package. The kernel's dependencies would add a
generator of initramfs, a module loader and a linker configuration. Root filesystems use the solver.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from . import _recipe, _sources
from ._errors import ImageError

_UPDATE_TIMEOUT_S = 120.0
_QUERY_TIMEOUT_S = 60.0
_DOWNLOAD_TIMEOUT_S = 600.0
_URI_LINE = re.compile(r"^'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})$")
_NAME_LINE = re.compile(r"^'[^']+' (\S+) \d+ ")
_HELD_FIELDS = ("Package:", "Version:", "Architecture:", "Multi-Arch:", "Provides:")
_MAX_DEB_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True, order=True)
class Package:
    """A package as apt resolved it."""

    name: str
    version: str
    architecture: str
    sha256: str
    size: int
    filename: str
    """Its name in the cache: `name_version_architecture.deb`."""


class Apt:
    """apt with all its files below `folder`."""

    def __init__(self, folder: Path, sources: Iterable[_sources.Source], keyring: Path) -> None:
        self._folder = folder.resolve()
        self._config = self._folder / "apt.conf"
        for name in ("state/lists/partial", "cache/archives/partial", "etc"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        lines = [source.line(keyring) for source in sources]
        (self._folder / "etc" / "sources.list").write_text("\n".join(lines) + "\n")
        self._config.write_text(self._settings(_host_transport()))

    def _settings(self, transport: list[tuple[str, str]]) -> str:
        own = self._folder
        settings = [
            *transport,
            # APT_CONFIG is read first, so that no other file is read and no hook of the host runs.
            ("Dir::Etc::Parts", "/dev/null"),
            ("Dir::Etc::Main", "/dev/null"),
            ("Dir::Etc::SourceList", f"{own}/etc/sources.list"),
            ("Dir::Etc::SourceParts", "/dev/null"),
            ("Dir::Etc::Preferences", "/dev/null"),
            ("Dir::Etc::PreferencesParts", "/dev/null"),
            ("Dir::Etc::Trusted", "/dev/null"),
            ("Dir::Etc::TrustedParts", "/dev/null"),
            ("Dir::Etc::Netrc", "/etc/apt/auth.conf"),
            ("Dir::Etc::NetrcParts", "/etc/apt/auth.conf.d"),
            ("Dir::State", f"{own}/state"),
            ("Dir::State::Lists", f"{own}/state/lists"),
            ("Dir::State::Status", "/dev/null"),
            ("Dir::State::Extended_States", "/dev/null"),
            ("Dir::Cache", f"{own}/cache"),
            ("Dir::Log", f"{own}/cache"),
            ("APT::Architecture", _recipe.ARCHITECTURE),
            ("APT::Get::AllowUnauthenticated", "false"),
            ("Acquire::AllowInsecureRepositories", "false"),
            ("Acquire::AllowWeakRepositories", "false"),
            ("Acquire::AllowDowngradeToInsecureRepositories", "false"),
            ("Acquire::Languages", "none"),
            ("Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled", "false"),
            ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false"),
        ]
        lines = [f'{key} "{value}";' for key, value in settings]
        lines.append(f'APT::Architectures {{ "{_recipe.ARCHITECTURE}"; }};')
        return "\n".join(lines) + "\n"

    def update(self) -> None:
        """Fetches the index files of all sources.

        :raises ImageError: `unreachable`: a mirror does not answer; `untrusted`: its signature is not Debian's
        """
        # By default a mirror that does not answer is only a warning.
        done = self._run(["apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update"], _UPDATE_TIMEOUT_S)
        if done.returncode != 0:
            text = _complaints(done.stderr)
            if "NO_PUBKEY" in text or "not signed" in text or "OpenPGP" in text or "invalid" in text:
                raise ImageError(
                    "untrusted",
                    f"A source is not signed by Debian's archive keys: {text}",
                    "name a Debian mirror with --mirror URL",
                )
            raise ImageError(
                "unreachable",
                f"The Debian mirror can't be reached: {text}",
                "check the network and the proxy settings of apt, or name another mirror with --mirror URL",
            )

    def resolve(self) -> list[Package]:
        """Returns the recipe's packages from the present index files, sorted by name.

        :raises ImageError: a package is missing
        """
        meta = _recipe.KERNEL_METAPACKAGE
        shown = self._run(["apt-cache", "show", "--no-all-versions", meta], _QUERY_TIMEOUT_S)
        depends = re.search(r"^Depends:.*?\b(linux-image-\d[a-z0-9.+-]*)", shown.stdout, re.MULTILINE)
        if shown.returncode != 0 or depends is None:
            raise ImageError(
                "unresolved",
                f"The archive has no {meta}: {_complaints(shown.stderr)}",
                "check that the mirror has the suite " + _recipe.SUITE,
            )
        return self._locate({*_recipe.PACKAGES, depends[1]})

    def resolve_with_dependencies(self, names: list[str], without: list[str]) -> list[Package]:
        """Returns packages and their dependencies from the present index files, sorted by name.

        :param without: packages that apt is told are installed, so that it skips them and dependencies of only them
        :raises ImageError: a package or a dependency is missing
        """
        status = self._folder / "installed"
        status.write_text("".join(map(_held, self._show(without))) if without else "")
        command = ["apt-get", "-q", "-q", "-o", f"Dir::State::Status={status}", "--no-install-recommends"]
        printed = self._run([*command, "--print-uris", "install", *names], _QUERY_TIMEOUT_S)
        if printed.returncode != 0:
            raise ImageError(
                "unresolved",
                f"The archive can't provide {', '.join(names)}: {_complaints(printed.stderr)}",
                "check that the mirror has the suite " + _recipe.SUITE,
            )
        # These lines have no SHA-256, so only the names are used.
        filenames = [matched[1] for line in printed.stdout.splitlines() if (matched := _NAME_LINE.match(line))]
        return self._locate({filename.split("_")[0] for filename in filenames})

    def _show(self, names: list[str]) -> list[str]:
        """Returns the stanza of each package in the index files."""
        shown = self._run(["apt-cache", "show", "--no-all-versions", *names], _QUERY_TIMEOUT_S)
        if shown.returncode != 0:
            raise ImageError(
                "unresolved",
                f"The archive lacks one of {', '.join(names)}: {_complaints(shown.stderr)}",
                "check that the mirror has the suite " + _recipe.SUITE,
            )
        return shown.stdout.strip().split("\n\n")

    def _locate(self, wanted: set[str]) -> list[Package]:
        names = sorted(wanted)
        printed = self._run(["apt-get", "--print-uris", "download", *names], _QUERY_TIMEOUT_S)
        found = [package for line in printed.stdout.splitlines() if (package := _package(line))]
        missing = set(names) - {package.name for package in found}
        if printed.returncode != 0 or missing:
            raise ImageError(
                "unresolved",
                f"The archive lacks {', '.join(sorted(missing)) or 'a package'}: {_complaints(printed.stderr)}",
                "check that the mirror has the suite " + _recipe.SUITE,
            )
        return sorted(found)

    def download(self, packages: Iterable[Package], folder: Path, progress: Callable[[int], None]) -> None:
        """Fetches packages into a folder.

        :param progress: called with the bytes that have arrived
        :raises ImageError: a package can't be fetched, or differs from what was resolved
        """
        wanted = list(packages)
        command = ["apt-get", "-q", "-q", "download", *(f"{item.name}={item.version}" for item in wanted)]
        errors = folder / "apt.stderr"
        with errors.open("wb") as stderr:
            process = self._start(command, folder, stderr.fileno())
            waited = 0.0
            try:
                while True:
                    try:
                        process.wait(0.1)
                        break
                    except subprocess.TimeoutExpired:
                        waited += 0.1
                        if waited > _DOWNLOAD_TIMEOUT_S:
                            raise ImageError(
                                "unreachable", f"The download took more than {_DOWNLOAD_TIMEOUT_S:.0f} s"
                            ) from None
                        progress(_bytes_in(folder))
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode != 0:
            text = _complaints(errors.read_text(errors="replace"))
            raise ImageError("unreachable", f"The packages can't be fetched: {text}", "try again, or use --mirror URL")
        errors.unlink()

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "APT_CONFIG": str(self._config), "LC_ALL": "C.UTF-8"}

    def _start(self, command: list[str], folder: Path, stderr: int) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                command,
                cwd=folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        except FileNotFoundError:
            raise _no_apt() from None

    def _run(self, command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                cwd=self._folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise _no_apt() from None
        except subprocess.TimeoutExpired:
            raise ImageError(
                "unreachable", f"apt did not end within {timeout_s:.0f} s", "check the network, or use --mirror URL"
            ) from None


def verify(package: Package, path: Path) -> bool:
    """Returns whether a file has the size and the SHA-256 of a package."""
    try:
        if path.stat().st_size != package.size:
            return False
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest() == package.sha256
    except FileNotFoundError:
        return False


def dump_list(packages: Iterable[Package]) -> list[dict[str, object]]:
    """Returns the list for `image.json`."""
    return [asdict(package) for package in sorted(packages)]


def load_list(text: str) -> list[Package]:
    """Parses the JSON of `dump_list`. :raises ValueError: the text is malformed."""
    try:
        rows = json.loads(text)
        found = [Package(**row) for row in rows]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"no list of packages: {error}") from None
    for package in found:
        for value in (package.name, package.version, package.architecture, package.sha256, package.filename):
            if not isinstance(value, str):
                raise ValueError("a field is not a text")
        if not isinstance(package.size, int) or "/" in package.filename:
            raise ValueError("a size or a file name is none")
    return sorted(found)


def _package(line: str) -> Package | None:
    matched = _URI_LINE.match(line)
    if matched is None:
        return None
    filename = matched[2]
    parts = filename.removesuffix(".deb").split("_")
    if len(parts) != 3 or "/" in filename or int(matched[3]) > _MAX_DEB_BYTES:
        return None
    name, version, architecture = parts
    # File names have %3a for the colon of an epoch.
    return Package(name, version.replace("%3a", ":"), architecture, matched[4], int(matched[3]), filename)


def _held(stanza: str) -> str:
    """Returns a stanza for the list of installed packages. On hold, or apt would upgrade it."""
    fields = [line for line in stanza.splitlines() if line.startswith(_HELD_FIELDS)]
    return "\n".join([*fields, "Status: hold ok installed", "Maintainer: nobody", "Description: none", "", ""])


def packages_by_name(packages: Iterable[Package], folder: Path) -> Mapping[str, Path]:
    """Returns the path of each package's file."""
    return {package.name: folder / package.filename for package in packages}


def _host_transport() -> list[tuple[str, str]]:
    try:
        done = subprocess.run(
            ["apt-config", "dump"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    except FileNotFoundError:
        raise _no_apt() from None
    except subprocess.TimeoutExpired:
        return []
    return _sources.transport_settings(done.stdout)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in [*folder.glob("*.deb"), *folder.glob("partial/*")]:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            pass
    return total


def _complaints(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith(("E:", "W:", "Err:"))]
    return (
        " ".join(line.split(":", 1)[1].strip() for line in lines[:3])[:600]
        or stderr.strip()[:300]
        or "apt says nothing"
    )


def require_programs() -> None:
    """:raises ImageError: this host lacks a program that builds need"""
    if not all(map(shutil.which, ("apt-get", "apt-config", "apt-cache", "dpkg-deb"))):
        raise _no_apt()


def _no_apt() -> ImageError:
    return ImageError(
        "no_apt",
        "There is no apt on this host",
        "images are built with apt-get and dpkg-deb: install the packages apt and dpkg, or build the image on a "
        "Debian host and copy its cache folder",
    )
