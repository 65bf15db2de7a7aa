"""Finds the addresses of the Debian archive in the host's apt sources.

Those sources also have vendors' repositories, local folders, and entries that are trusted without a signature. None of
that may get into an image. So only the address of an entry is used, and only if it has a suite of Debian and the
component `main`. The suite is ours, and the signature must be that of Debian's archive keyring. A foreign archive that
passes this filter fails apt's check.

Of the rest of the host's configuration only proxies and certificates are used (`transport_settings`): they decide
whether bytes arrive, not which.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import _recipe
from ._errors import ImageError

KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
)
_ARCHIVE_KEYRING = re.compile(r"^(/usr/share/keyrings|/etc/apt/trusted\.gpg\.d)/debian-archive-[a-z-]*\.(pgp|gpg|asc)$")
_SUITE = re.compile(r"^(?:bullseye|bookworm|trixie|forky|sid|oldstable|stable|testing|unstable)(-updates|-security|)$")
_SCHEMES = ("http://", "https://", "mirror+http://", "mirror+https://", "mirror+file:/", "file:/", "copy:/")
_MAX_BYTES = 1024 * 1024

_TRANSPORT = re.compile(
    r"^(?:Acquire::(?:http|https)::"
    r"(?:Proxy|Proxy-Auto-Detect|ProxyAutoDetect|CAInfo|CAPath|Verify-Peer|Verify-Host|SslCert|SslKey|Timeout|User-Agent)"
    r"|Acquire::(?:http|https)::Proxy::[A-Za-z0-9.:_-]+"
    r"|Acquire::(?:http|https)::[A-Za-z0-9.-]+::(?:CAInfo|CAPath|SslCert|SslKey|Verify-Peer|Verify-Host)"
    r"|Acquire::(?:Retries|Check-Valid-Until|ForceIPv4|ForceIPv6))$",
    re.IGNORECASE,
)
_DUMPED = re.compile(r'^([^\s"]+) "(.*)";$')


@dataclass(frozen=True, slots=True, order=True)
class Source:
    """A suite of the archive at an address."""

    uri: str
    suite: str

    def line(self, keyring: Path) -> str:
        """Returns the entry for a sources.list, with `keyring` for its signature."""
        options = f"arch={_recipe.ARCHITECTURE} signed-by={keyring}"
        return f"deb [{options}] {self.uri} {self.suite} {_recipe.COMPONENT}"


def host_sources(etc_apt: Path = Path("/etc/apt")) -> list[Source]:
    """Returns the host's sources of the Debian archive, in apt's order."""
    found: list[Source] = []
    parts = etc_apt / "sources.list.d"
    names = sorted(parts.iterdir()) if parts.is_dir() else []
    for path in [etc_apt / "sources.list", *names]:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        try:
            text = path.read_bytes()[:_MAX_BYTES].decode(errors="replace")
        except OSError:
            continue
        found += parse_deb822(text) if path.suffix == ".sources" else parse_one_line(text)
    return list(dict.fromkeys(found))


def archive() -> list[Source]:
    """Returns the host's sources of the Debian archive. :raises ImageError: there are none."""
    sources = host_sources()
    if not sources:
        raise ImageError(
            "no_sources",
            "This host's apt has no source of the Debian archive",
            "name a mirror with --mirror URL, and Debian's keys with --keyring FILE where the host lacks the package "
            "debian-archive-keyring",
        )
    return sources


def explicit_sources(mirror: str, security_mirror: str | None) -> list[Source]:
    """Returns the sources for addresses from the command line. :raises ImageError: apt can't use an address."""
    for address in filter(None, (mirror, security_mirror)):
        if not address.startswith(_SCHEMES) or any(char.isspace() or char in "[]\"'" for char in address):
            raise ImageError(
                "bad_mirror", f"{address!r} is not an address of a Debian mirror", "give one with http or https"
            )
    sources = [Source(mirror, _recipe.SUITE), Source(mirror, f"{_recipe.SUITE}-updates")]
    if security_mirror:
        sources.append(Source(security_mirror, f"{_recipe.SUITE}-security"))
    return sources


def find_keyring(candidates: Iterable[Path] = KEYRINGS) -> Path:
    """Returns the host's keyring of the Debian archive. :raises ImageError: there is none."""
    for path in candidates:
        if path.is_file():
            return path
    raise ImageError(
        "no_keyring",
        "This host has no keyring of the Debian archive",
        "install the package debian-archive-keyring, or name one with --keyring FILE",
    )


def parse_deb822(text: str) -> list[Source]:
    """Returns the usable sources of a `.sources` file."""
    found: list[Source] = []
    for stanza in _stanzas(text):
        if stanza.get("enabled", "yes").strip().lower() in ("no", "false", "without", "off", "disable", "0"):
            continue
        if "deb" not in stanza.get("types", "").split():
            continue
        found += _usable(
            stanza.get("uris", "").split(),
            stanza.get("suites", "").split(),
            stanza.get("components", "").split(),
            stanza.get("architectures", "").replace(",", " ").split(),
            stanza.get("signed-by", ""),
            "trusted" in stanza,
        )
    return found


def parse_one_line(text: str) -> list[Source]:
    """Returns the usable sources of a `.list` file."""
    found: list[Source] = []
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        matched = re.match(r"^deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s*(.*)$", line)
        if matched is None:
            continue
        try:
            options = dict(word.split("=", 1) for word in shlex.split(matched[1] or "") if "=" in word)
        except ValueError:
            continue
        options = {key.lower().rstrip("+-"): value for key, value in options.items()}
        found += _usable(
            [matched[2]],
            [matched[3]],
            matched[4].split(),
            options.get("arch", "").replace(",", " ").split(),
            options.get("signed-by", ""),
            "trusted" in options,
        )
    return found


def _usable(
    uris: list[str], suites: list[str], components: list[str], architectures: list[str], signed_by: str, trusted: bool
) -> Iterator[Source]:
    # "trusted", yes or no, overrides the check of signatures.
    if trusted or _recipe.COMPONENT not in components:
        return
    if architectures and _recipe.ARCHITECTURE not in architectures:
        return
    if any(not _ARCHIVE_KEYRING.match(name) for name in re.split(r"[\s,]+", signed_by.strip()) if name):
        return
    for uri in uris:
        if not uri.startswith(_SCHEMES) or any(char in "[]\"'" for char in uri):
            continue
        for suite in suites:
            # Not old names such as `buster/updates`, nor flat repositories such as `./`.
            matched = _SUITE.match(suite)
            if matched:
                yield Source(uri, _recipe.SUITE + matched[1])


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    stanza: dict[str, str] = {}
    key = ""
    for raw in [*text.splitlines(), ""]:
        if raw.startswith("#"):
            continue
        if not raw.strip():
            if stanza:
                yield stanza
            stanza, key = {}, ""
        elif raw[0] in " \t":
            if key:
                stanza[key] += "\n" + raw.strip()
        elif ":" in raw:
            key, value = raw.split(":", 1)
            key = key.strip().lower()
            stanza[key] = value.strip()


def transport_settings(dump: str) -> list[tuple[str, str]]:
    """Returns the settings of `apt-config dump` for reaching the network, in order."""
    found = []
    for line in dump.splitlines():
        matched = _DUMPED.match(line)
        if matched and matched[2] and _TRANSPORT.match(matched[1]):
            found.append((matched[1], matched[2]))
    return found
