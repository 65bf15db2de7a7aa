"""Runs mmdebstrap, which drives the host's apt with a configuration of its own.

Of the host's configuration only what `_sources.transport_settings` returns is used, and the logins of apt: no pin and
no hook of the host gets into an image. Scripts in mmdebstrap's hooks bring packages and index into the new tree before
apt starts, and take those that were used out of it at the end.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from . import _recipe, _sources
from ._errors import ImageError
from ._progress import Progress

EPOCH = 1754697600
"""2025-08-09, when Debian 13 was released: files of an image that are newer, or made by its build, have this time. So
the same packages make the same bytes."""
_KEPT_LINES = 400
"""The number of lines of output that are kept for error messages; apt repeats its errors at the end."""
_MAX_LINE = 4096
"""In characters. A longer line counts as several."""
_REAP_S = 10.0

_SETTINGS = """
Dir::Etc::Netrc "/etc/apt/auth.conf";
Dir::Etc::NetrcParts "/etc/apt/auth.conf.d";
Dir::Etc::Trusted "";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::GzipIndexes "true";
"""
_SETUP = r"""
set -eu
printf '%s\n' "$SETTINGS" "Dir::Etc::TrustedParts \"$WORK/keys\";" \
    "Dir::State::Lists \"$1/volant/lists\";" "Dir::Cache \"$1/volant\";" >>"$MMDEBSTRAP_APT_CONFIG"
cp -r "$WORK/packages" "$1/volant"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
# apt itself retries for many minutes if a mirror takes connections and does not answer.
[ "$OFFLINE" ] || timeout --foreground 120 apt-get -q --error-on=any update || {
    [ $? != 124 ] || echo "E: Failed to fetch the index within 120 s" >&2
    exit 1
}
# For apt, packages to leave out are installed already, in the version that it would install.
[ -z "$WITHOUT" ] || apt-cache show --no-all-versions $WITHOUT | sed -nE '
    s/^Package: .*/&\nStatus: hold ok installed/p
    /^(Version|Architecture|Multi-Arch|Provides):/p
    /^$/p' >>"$1/var/lib/dpkg/status"
"""
_FINISH = r"""
set -eu
mkdir "$1/volant/used"
if [ "$MMDEBSTRAP_HOOK" = extract ]; then
    printf '%s\n' $MMDEBSTRAP_ESSENTIAL | sed 's,.*/,,'
else
    dpkg-query --admindir="$1/var/lib/dpkg" -Wf '${Package}_${Version}_${Architecture}.deb\n' | sed 's/:/%3a/'
fi | (cd "$1/volant/archives" && xargs mv -t ../used)
cd "$1/volant"
rm -rf archives *.bin lists/partial lists/auxfiles lists/lock
"""
_CLEAN = r"""
set -eu
cd "$1"
rm -rf volant etc/hostname etc/resolv.conf
if [ "$MMDEBSTRAP_HOOK" = extract ]; then
    # What mmdebstrap and apt made in a tree that has neither apt nor dpkg.
    rm -rf dev tmp etc/apt etc/dpkg etc/fstab var/cache/apt var/lib/apt var/lib/dpkg var/log/apt
else
    # What depends on the versions of mmdebstrap and apt. Times of folders are cut to SOURCE_DATE_EPOCH.
    rm -rf var/cache/apt/*.bin var/cache/debconf/tmp.ci var/cache/debconf/*-old var/lib/dpkg/*-old
    rm -f var/lib/apt/extended_states
    find . \( -path ./dev -o -path ./proc -o -path ./sys \) -prune -o -type d -exec touch {} +
fi
"""
_ENVIRONMENT = re.compile(r"PATH|[a-z]+_proxy")

_PHASES = (
    ("unpack", re.compile("I: extracting archives"), "Unpacking the packages"),
    ("install", re.compile("Setting up "), "Installing the packages"),
    ("write", re.compile("I: creating tarball"), "Writing the files"),
)
_NEEDED = re.compile(r"Need to get ([\d.,]+) (k|M|G|)B")
_FETCHED = re.compile(r"Get:\d+ .*\[([\d.,]+) (k|M|G|)B\]$")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}

_FAILURES = (
    (
        "untrusted",
        r"NO_PUBKEY|not signed|OpenPGP|invalid (?:since|for)|Hash Sum mismatch",
        "The packages are not signed by Debian's archive keys",
        "name a Debian mirror with --mirror URL, and with --keyring FILE the keys that sign it",
    ),
    (
        "unresolved",
        r"Unable to locate package|no installation candidate|[Uu]nmet dependencies|"
        r"Unable to correct problems|did not find any indices",
        "The mirror does not have the packages",
        f"check that it has the suite {_recipe.SUITE}",
    ),
    (
        "cache_full",
        r"No space left on device|Disk quota exceeded",
        "The disk is full",
        "make room on the file system of the cache",
    ),
    (
        "unreachable",
        r"Failed to fetch|does not have a Release file|Unable to fetch",
        "The Debian mirror can't be reached",
        "check the network and the proxy settings of apt, or name another mirror with --mirror URL",
    ),
    (
        "no_namespaces",
        r"unable to pick chroot mode|need working fakechroot|unshare.* failed|newuidmap|newgidmap",
        "Your user may not make a root filesystem on this host",
        "install the package uidmap and give your user subordinate IDs (`usermod --add-subuids 100000-165535 "
        "--add-subgids 100000-165535 USER`), install the package fakechroot, or build as root",
    ),
)


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """What mmdebstrap makes of Debian's packages."""

    variant: str
    """`extract` unpacks packages, as any user; others install them, and run their scripts in a root filesystem."""
    include: Sequence[str]
    """Packages, besides those of the variant; their dependencies come with them."""
    without: Sequence[str] = ()
    """Packages that are left out, with the dependencies that only they need. For `extract`."""
    options: Sequence[str] = ()
    """More options of mmdebstrap."""


def run(
    bootstrap: Bootstrap,
    target: Path,
    work: Path,
    packages: Path,
    sources: Sequence[str],
    report: Callable[[Progress], None],
    *,
    offline: bool,
) -> None:
    """Makes a tree or a tar, and moves the packages and the index that it was made of to a folder.

    :param target: a folder that does not exist, or a file that ends with `.tar`
    :param work: a folder with `keys/`, the keys that sign the archive, and `packages/`, what a former run left in
        `packages`; it gets temporary files
    :param packages: the folder for packages and index
    :param sources: lines of apt's sources; none: the mirrors that mmdebstrap knows
    :param offline: use the packages and the index in `work` alone
    :raises ImageError: it fails
    """
    installs = bootstrap.variant != "extract"
    stage = "customize" if installs else "extract"
    out = shlex.quote(str(packages))
    hooks = [
        '--setup-hook=eval "$SETUP"',
        f'--{stage}-hook=eval "$FINISH"',
        *(f"--{stage}-hook=sync-out /volant/{name} {out}/{name}" for name in ("used", "lists")),
        f'--{stage}-hook=eval "$CLEAN"',
    ]
    command = [
        *("mmdebstrap", "--verbose", f"--mode={_mode() if installs else 'chrootless'}"),
        f"--variant={bootstrap.variant}",
        f"--architectures={_recipe.ARCHITECTURE}",
        f"--include={','.join(bootstrap.include)}",
        # Its own lists and archives of apt are not used; `extract` runs nothing that `check/chrootless` warns of.
        "--skip=update,check/signed-by,check/chrootless,output/dev," + ("cleanup/apt" if installs else "cleanup"),
        *hooks,
        *bootstrap.options,
        *("--", _recipe.SUITE, str(target), *sources),
    ]
    given = {name: value for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name)}
    environment = {
        **given,
        "TMPDIR": str(work),
        "SOURCE_DATE_EPOCH": str(EPOCH),
        "TZ": "UTC",
        "WORK": str(work),
        "SETUP": _SETUP,
        "FINISH": _FINISH,
        "CLEAN": _CLEAN,
        "SETTINGS": _sources.transport_settings() + _SETTINGS + ('APT::Get::Download "false";' if offline else ""),
        "OFFLINE": "yes" if offline else "",
        "WITHOUT": " ".join(bootstrap.without),
    }
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise _missing() from None
    with process:
        assert process.stderr is not None
        try:
            kept = deque(_reported(iter(partial(process.stderr.readline, _MAX_LINE), ""), report), _KEPT_LINES)
        finally:
            # An interrupt of the terminal reaches it, too, and it removes its files.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_REAP_S)
            process.kill()
    if process.returncode != 0:
        raise _failure(list(kept))


def obstacle() -> ImageError | None:
    """Returns the error that builds fail with on this host, or None. Does not use the network."""
    if shutil.which("mmdebstrap") is None:
        return _missing()
    try:
        _sources.find_keyring()
    except ImageError as error:
        return error
    return None


def _missing() -> ImageError:
    return ImageError(
        "no_mmdebstrap",
        "There is no mmdebstrap on this host",
        "install the package mmdebstrap, or build the image on a Debian host and copy its cache folder",
    )


def remove_tree(folder: Path) -> None:
    """Removes a folder of which some files may be of subordinate IDs of this user, if a killed mmdebstrap left it."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists() and os.geteuid() != 0:
        folder.chmod(0o777)
        command = ["mmdebstrap", "--unshare-helper", "find", str(folder), "-mindepth", "1", "-delete"]
        subprocess.run(command, cwd="/", capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _mode() -> str:
    """Returns how a root filesystem is made: if possible in a mount namespace of its own, which ends with it."""
    may_mount = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    return "unshare" if may_mount else "auto"


def _reported(lines: Iterator[str], report: Callable[[Progress], None]) -> Iterator[str]:
    """Yields the lines of mmdebstrap's output, and reports the progress that they tell."""
    total = done = latest = 0
    last = ""
    for line in lines:
        if needed := _NEEDED.match(line):
            total, done, latest = _count(needed), 0, 0
            report(Progress("download", "Fetching packages", 0, total, "bytes"))
        elif total and (fetched := _FETCHED.match(line)):
            # A line comes when a file begins, not when it is there.
            done, latest = done + latest, _count(fetched)
            report(Progress("download", "Fetching packages", min(done, total), total, "bytes"))
        else:
            for phase, pattern, message in _PHASES:
                if phase != last and pattern.match(line):
                    last = phase
                    report(Progress(phase, message))
        yield line.rstrip("\n")


def _count(matched: re.Match[str]) -> int:
    return int(float(matched[1].replace(",", "")) * _UNITS[matched[2]])


def _failure(lines: Sequence[str]) -> ImageError:
    # mmdebstrap's own errors, after those of apt and dpkg, only say which command failed.
    errors = [line.removeprefix("E:") for line in lines if line.startswith("E:") and " failed" not in line]
    last = [line for line in lines if not line.startswith(("E:", "I:", "W:"))][-3:]
    said = " ".join(" ".join(errors[:2] or last).split())[:600] or "no error"
    text = "\n".join(line for line in lines if re.match(r"(?:E|W|Err|[a-z-]+):", line))
    for code, pattern, message, hint in _FAILURES:
        if re.search(pattern, text):
            return ImageError(code, f"{message}: {said}", hint)
    return ImageError("build_failed", f"mmdebstrap failed: {said}")
