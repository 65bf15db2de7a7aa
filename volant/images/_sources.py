"""Finds the mirrors of the Debian archive and its keys on this host.

The suite is ours, and the signature must be that of Debian's archive keyring. So of the host's apt sources only the
addresses are used, and only of those whose signed index says that it is Debian's; without any index, of those with a
suite of Debian's. Without an address, mmdebstrap asks the mirrors that it knows.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from . import _recipe
from ._errors import ImageError

KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
)
_SCHEMES = ("http://", "https://", "mirror+http://", "mirror+https://", "mirror+file:/", "file:/", "copy:/")
_INDEX = re.compile(r"Debian\|(?:bullseye|bookworm|trixie|forky|sid)(-updates|-security|)\|main\|(\S+)")
"""Of a release, its updates and its security updates; not of backports."""
_TRANSPORT = (
    *("Acquire::http", "Acquire::https", "Acquire::ForceIPv4", "Acquire::ForceIPv6", "Acquire::Retries"),
    "Acquire::Check-Valid-Until",
)
"""Settings that decide whether an index or a package arrives, but not which."""
_QUERY_TIMEOUT_S = 60.0


def host_sources() -> list[str]:
    """Returns apt's lines for the mirrors of the Debian archive that this host uses, in its order; perhaps none."""
    # A host that has fetched no index yet, such as a new container, only knows the names of its suites.
    found = _indexes("$(ORIGIN)|$(CODENAME)") or _indexes("Debian|$(RELEASE)", "--no-release-info")
    return list(dict.fromkeys(_line(matched[2], matched[1]) for matched in found))


def _indexes(names: str, *options: str) -> list[re.Match[str]]:
    form = f"{names}|$(COMPONENT)|$(REPO_URI)"
    listed = _ask("apt-get", "indextargets", *options, "--format", form, "Created-By: Packages")
    return [matched for line in listed.splitlines() if (matched := _INDEX.fullmatch(line))]


def explicit_sources(mirror: str, security_mirror: str | None) -> list[str]:
    """Returns apt's lines for addresses from the command line. :raises ImageError: apt can't use an address."""
    for address in filter(None, (mirror, security_mirror)):
        if not address.startswith(_SCHEMES) or any(char.isspace() or char in "[]\"'" for char in address):
            raise ImageError(
                "bad_mirror", f"{address!r} is not an address of a Debian mirror", "give one with http or https"
            )
    lines = [_line(mirror, ""), _line(mirror, "-updates")]
    return [*lines, _line(security_mirror, "-security")] if security_mirror else lines


def find_keyring() -> Path:
    """Returns the host's keyring of the Debian archive. :raises ImageError: there is none."""
    for path in KEYRINGS:
        if path.is_file():
            return path
    raise ImageError(
        "no_keyring",
        "This host has no keyring of the Debian archive",
        "install the package debian-archive-keyring, or name one with --keyring FILE",
    )


def transport_settings() -> str:
    """Returns this host's settings of apt for proxies, certificates and retries, as lines of an apt.conf."""
    return _ask("apt-config", "dump", *_TRANSPORT)


def _line(address: str, part: str) -> str:
    # A chroot can't reach a file of the host, so apt copies it.
    return f"deb {re.sub('^file:', 'copy:', address)} {_recipe.SUITE}{part} {_recipe.COMPONENT}"


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_QUERY_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
