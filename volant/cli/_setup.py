"""`volar setup`: installs the daemon as a systemd service, from the units in the package."""

from __future__ import annotations

import grp
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import click

import volant

from . import _doctor
from ._options import Options, common, pass_options
from ._output import Output
from ._run import Failure, guarded

UNITS = ("volant.slice", "volantd.socket", "volant-guests.service", "volantd.service")
DIRECTORY = Path("/etc/systemd/system")

_ENABLED = ("volantd.socket", "volant-guests.service", "volantd.service")
_BOOTED = Path("/run/systemd/system")
ENVIRONMENT = Path("/etc/default/volantd")
"""The daemon's settings as a service."""
_RUNTIME = Path("/run/volant")
_GROUP = "volant"
"""The group that may use the daemon's socket. It stays when the service is removed, as files may belong to it."""
_KEPT = (Path("/var/lib/volant"), Path("/var/lib/volant-keys"), Path("/var/cache/volant"))
HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
"""Directories that the sandbox of the units hides."""
_PLAIN = re.compile(r"[A-Za-z0-9/._+@-]+")
_TIMEOUT_S = 300.0


def rendered() -> dict[str, str]:
    """Returns the text of each unit, for this installation. :raises Failure: a unit can't contain its path"""
    folder = files("volant") / "daemon" / "units"
    values = {
        "volantd": _program("volantd", "volant.daemon.main"),
        "guests": f"{_plain(sys.executable)} -P -m volant.daemon.guests",
        "bind": "\n".join(f"BindReadOnlyPaths={_plain(path)}" for path in _hidden_paths()),
        "sandbox": (folder / "sandbox.conf").read_text(),
    }
    return {name: _filled((folder / name).read_text(), values) for name in UNITS}


def _filled(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return re.sub(r"\n{3,}", "\n\n", text).replace("\n\n# What the daemon, and", "\n# What the daemon, and")


def _program(script: str, module: str) -> str:
    return " ".join(map(_plain, command_of(script, module)))


def command_of(script: str, module: str) -> list[str]:
    """Returns what runs a program of this installation."""
    path = Path(sys.executable).parent / script
    return [str(path)] if path.is_file() else [sys.executable, "-P", "-m", module]


def _plain(path: str | Path) -> str:
    text = str(path)
    if not _PLAIN.fullmatch(text):
        raise Failure(
            f"Volant is installed in {text!r}, and a unit can't contain such a path",
            hint="install it in a path of letters, digits and /._+@- only",
        )
    return text


def _hidden_paths() -> list[Path]:
    """Returns the directories of Python and of the package that the sandbox would hide, such as those in a home."""
    needed = {
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(sys.executable).resolve().parent.parent,
        Path(volant.__file__).resolve().parents[1],
    }
    hidden = {path for path in needed if any(path.is_relative_to(place) for place in HIDDEN)}
    return sorted(path for path in hidden if not any(other != path and path.is_relative_to(other) for other in hidden))


class _Work:
    """Makes the changes, or with `dry` only prints them."""

    def __init__(self, out: Output, dry: bool) -> None:
        self._out = out
        self.dry = dry

    def warn(self, text: str) -> None:
        self._out.note(text)

    def write(self, path: Path, text: str) -> bool:
        """Writes a file; returns whether its text changed."""
        if self.dry:
            self._out.line(f"# write {path}")
            for line in text.splitlines():
                self._out.line(line)
            self._out.line("")
            return True
        if path.is_file() and path.read_text() == text:
            return False
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(text)
        fresh.chmod(0o644)
        fresh.replace(path)
        self._out.note(f"wrote {path}")
        return True

    def remove(self, path: Path) -> None:
        if self.dry:
            self._out.line(f"# remove {path}")
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            self._out.note(f"removed {path}")
        elif path.exists() or path.is_symlink():
            path.unlink()
            self._out.note(f"removed {path}")

    def group(self, name: str) -> None:
        """Creates a system group unless it exists."""
        with suppress(KeyError):
            grp.getgrnam(name)
            return
        if self.dry:
            self._out.line(f"# run groupadd --system {name}")
            return
        try:
            done = subprocess.run(
                ["groupadd", "--system", name], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
            failure = None if done.returncode == 0 else done.stderr.strip()[-1000:]
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = str(error)
        if failure is not None:
            raise Failure(f"groupadd --system {name} failed: {failure}", hint=f"create the group {name} yourself")
        self._out.note(f"created the group {name}; its members can use the daemon")

    def systemctl(self, *arguments: str, hint: str | None = None, may_fail: bool = False) -> None:
        if self.dry:
            self._out.line(f"# run systemctl {' '.join(arguments)}")
            return
        done = _systemctl(*arguments)
        if done.returncode != 0 and not may_fail:
            message = (done.stderr or done.stdout).strip()
            raise Failure(f"systemctl {' '.join(arguments)} failed: {message[-1000:]}", hint=hint)


def _systemctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["systemctl", "--no-pager", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise Failure("there is no systemctl on this host", hint=_WITHOUT) from None
    except subprocess.TimeoutExpired:
        raise Failure(f"systemctl {' '.join(arguments)} takes longer than {_TIMEOUT_S:g} s") from None


_WITHOUT = "volantd does not need systemd: run it in a terminal, or under another service manager"


def _check(what: str) -> None:
    if not _BOOTED.is_dir():
        raise Failure("this host does not run systemd", hint=_WITHOUT)
    if os.geteuid() != 0:
        raise Failure(f"only root can {what} services", hint="try it with sudo; --dry-run shows what it would do")


def settings() -> dict[str, str]:
    """Returns the service's settings, if this user may read them."""
    try:
        return variables(ENVIRONMENT.read_text(errors="replace"))
    except OSError:
        return {}


def variables(text: str) -> dict[str, str]:
    """Returns the variables of a file for systemd."""
    given = (
        line.partition("=") for line in map(str.strip, re.split(r"[\r\n]", text)) if not line.startswith(("#", ";"))
    )
    return {name.strip(): _unquoted(value.strip()) for name, equals, value in given if equals}


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        return re.sub(r'\\([\\"$`])', r"\1", value[1:-1])
    return value.strip("\"' ")


def _install(work: _Work) -> None:
    units = rendered()
    # The socket unit decides the addresses.
    if addresses := settings().get("VOLANT_API_LISTEN_ADDR"):
        work.warn(
            f"VOLANT_API_LISTEN_ADDR={addresses} in {ENVIRONMENT} does nothing here: systemd opens the sockets; "
            "set the addresses with `systemctl edit volantd.socket`"
        )
    if not work.dry:
        _check("install")
    work.group(_GROUP)
    changed = {name for name, text in units.items() if work.write(DIRECTORY / name, text)}
    if changed:
        work.systemctl("daemon-reload")
    work.systemctl("enable", *_ENABLED)
    look = "`journalctl -u volantd.service -u volantd.socket -n 50` shows why"
    if "volantd.socket" in changed:
        # Its addresses may have changed, and the daemon gets its sockets from it.
        work.systemctl("stop", "volantd.service", may_fail=True)
        work.systemctl("restart", "volantd.socket", hint=look)
    work.systemctl("start", *_ENABLED[:2], hint=look)
    # The installed version may be another; VMs keep running.
    work.systemctl("restart", "volantd.service", hint=look)


def _uninstall(work: _Work, stop_vms: bool, purge: bool) -> None:
    if not work.dry:
        _check("remove")
        if not stop_vms and (running := _scopes()):
            raise Failure(
                f"{len(running)} VMs run: {', '.join(running[:10])}",
                hint="stop them (`volar system drain --stop-vms --wait`), or add --stop-vms",
            )
    work.systemctl("disable", "--now", "volantd.service", "volantd.socket", may_fail=True)
    # The first shuts guests down, the second kills those that are left.
    work.systemctl("disable", "--now", "volant-guests.service", may_fail=True)
    work.systemctl("stop", "volant.slice", may_fail=True)
    for name in reversed(UNITS):
        work.remove(DIRECTORY / name)
    work.systemctl("daemon-reload")
    work.systemctl("reset-failed", *UNITS, may_fail=True)
    for path in (_RUNTIME, *(_KEPT if purge else ())):
        work.remove(path)
    for path in Path("/dev/shm").glob("volant-*"):
        if not work.dry:
            with suppress(OSError):
                path.rmdir()


def _scopes() -> Sequence[str]:
    lines = _systemctl("list-units", "--plain", "--no-legend", "--state=running", "volant-*.scope").stdout.splitlines()
    return [line.split()[0] for line in lines if line.strip()]


@click.command(name="setup")
@click.option("--check", is_flag=True, help="Only check whether VMs can run here, and what is missing.")
@click.option("--dry-run", is_flag=True, help="Print the units and what would be done; do nothing.")
@click.option("--uninstall", is_flag=True, help="Remove the service; what VMs have on disk stays.")
@click.option("--stop-vms", is_flag=True, help="With --uninstall: shut down guests that run.")
@click.option("--purge", is_flag=True, help="With --uninstall: remove the database, disks, logs and the cache, too.")
@common()
@pass_options
def group(options: Options, check: bool, dry_run: bool, uninstall: bool, stop_vms: bool, purge: bool) -> int:
    """Install volantd as a systemd service, and start it.

    You can run it again, also after an upgrade: running VMs keep running.

    --check changes nothing, and needs neither root nor a daemon. It reports each check as `ok`, `less` (VMs run, with
    a limit) or `fails`, with the consequence and what to do. The exit code is 1 if a check fails.
    """

    def work() -> int:
        if (stop_vms or purge) and not uninstall:
            raise click.UsageError("--stop-vms and --purge need --uninstall")
        out = Output(options.json)
        if check:
            if dry_run or uninstall:
                raise click.UsageError("--check can't be combined with other options")
            return _doctor.check(out, command_of("volantd", "volant.daemon.main"), settings())
        doing = _Work(out, dry_run)
        try:
            if uninstall:
                _uninstall(doing, stop_vms, purge)
            else:
                _install(doing)
        except OSError as error:
            raise Failure(f"{error.filename}: {error.strerror}") from error
        if options.json and not dry_run:
            out.document({"installed": not uninstall, "units": list(UNITS)})
        elif not dry_run:
            out.line("volantd is removed" if uninstall else "volantd runs; `volar system status` shows its state")
        return 0

    return guarded(options, work)
