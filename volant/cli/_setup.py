"""`volar setup`: installs the daemon as a systemd service, from the units in the package."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
"""The settings of the daemon as a service."""
_RUNTIME = Path("/run/volant")
_GROUP = "volant"
"""The group that may use the daemon's socket. It is kept when the service is removed, as files may belong to it."""
_KEPT = (Path("/var/lib/volant"), Path("/var/lib/volant-keys"), Path("/var/cache/volant"))
HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
"""Directories that the sandbox of the units hides."""
_PLAIN = re.compile(r"[A-Za-z0-9/._+@-]+")
_TIMEOUT_S = 300.0
_WITHOUT = "volantd does not need systemd: run it in a terminal, or under another service manager"


def rendered() -> dict[str, str]:
    """Returns the text of each unit, for this installation. :raises Failure: a unit can't contain its path."""
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
    """Returns the command that runs a program of this installation."""
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
    """Returns the directories of Python and of the package that the sandbox would hide, such as in a home directory."""
    needed = {
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(sys.executable).resolve().parent.parent,
        Path(volant.__file__).resolve().parents[1],
    }
    hidden = {path for path in needed if any(path.is_relative_to(place) for place in HIDDEN)}
    return sorted(path for path in hidden if not any(other != path and path.is_relative_to(other) for other in hidden))


@dataclass(frozen=True)
class _Write:
    path: Path
    text: str

    def __str__(self) -> str:
        return f"write {self.path}\n{self.text}"

    def do(self) -> str | None:
        if self.path.is_file() and self.path.read_text() == self.text:
            return None
        fresh = self.path.with_name(f".{self.path.name}.new")
        fresh.write_text(self.text)
        fresh.chmod(0o644)
        fresh.replace(self.path)
        return f"wrote {self.path}"


@dataclass(frozen=True)
class _Remove:
    path: Path

    def __str__(self) -> str:
        return f"remove {self.path}"

    def do(self) -> str | None:
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        elif self.path.exists() or self.path.is_symlink():
            self.path.unlink()
        else:
            return None
        return f"removed {self.path}"


@dataclass(frozen=True)
class _Run:
    command: tuple[str, ...]
    hint: str | None = None
    may_fail: bool = False

    def __str__(self) -> str:
        return f"run {shlex.join(self.command)}"

    def do(self) -> str | None:
        done = _run(*self.command)
        if done.returncode != 0 and not self.may_fail:
            message = (done.stderr or done.stdout).strip()
            raise Failure(f"{shlex.join(self.command)} failed: {message[-1000:]}", hint=self.hint)
        return None


_Step = _Write | _Remove | _Run


def _systemctl(*arguments: str, hint: str | None = None, may_fail: bool = False) -> _Run:
    return _Run(("systemctl", "--no-pager", *arguments), hint, may_fail)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise Failure(f"there is no {command[0]} on this host", hint=_WITHOUT) from None
    except subprocess.TimeoutExpired:
        raise Failure(f"{shlex.join(command)} takes longer than {_TIMEOUT_S:g} s") from None


def _installation() -> Iterator[_Step]:
    """Yields the steps that install or update the service; running VMs keep running."""
    units = rendered()
    socket = DIRECTORY / "volantd.socket"
    # The daemon gets its sockets from it, and its addresses may change.
    is_new = not socket.is_file() or socket.read_text() != units[socket.name]
    look = "`journalctl -u volantd.service -u volantd.socket -n 50` shows why"
    yield _Run(("systemd-sysusers", "--inline", f"g {_GROUP} -"))
    for name, text in units.items():
        yield _Write(DIRECTORY / name, text)
    yield _systemctl("daemon-reload")
    yield _systemctl("enable", *_ENABLED)
    if is_new:
        yield _systemctl("stop", "volantd.service", may_fail=True)
        yield _systemctl("restart", "volantd.socket", hint=look)
    yield _systemctl("start", *_ENABLED[:2], hint=look)
    # The installed version may be another.
    yield _systemctl("restart", "volantd.service", hint=look)


def _removal(purge: bool) -> Iterator[_Step]:
    """Yields the steps that remove the service."""
    yield _systemctl("disable", "--now", "volantd.service", "volantd.socket", may_fail=True)
    # The first shuts guests down, the second kills those that are left.
    yield _systemctl("disable", "--now", "volant-guests.service", may_fail=True)
    yield _systemctl("stop", "volant.slice", may_fail=True)
    for name in reversed(UNITS):
        yield _Remove(DIRECTORY / name)
    yield _systemctl("daemon-reload")
    yield _systemctl("reset-failed", *UNITS, may_fail=True)
    for path in (_RUNTIME, *(_KEPT if purge else ())):
        yield _Remove(path)
    # Another daemon may have its own there.
    yield _Run(("find", "/dev/shm", "-maxdepth", "1", "-name", "volant-*", "-empty", "-delete"), may_fail=True)


def _check(what: str) -> None:
    if not _BOOTED.is_dir():
        raise Failure("this host does not run systemd", hint=_WITHOUT)
    if os.geteuid() != 0:
        raise Failure(f"only root can {what} services", hint="try it with sudo; --dry-run shows what it would do")


def _check_no_vms() -> None:
    listed = _run("systemctl", "list-units", "--plain", "--no-legend", "--state=running", "volant-*.scope").stdout
    running = [line.split()[0] for line in listed.splitlines() if line.strip()]
    if running:
        raise Failure(
            f"{len(running)} VMs run: {', '.join(running[:10])}",
            hint="stop them (`volar system drain --stop-vms --wait`), or add --stop-vms",
        )


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


@click.command(name="setup")
@click.option("--check", is_flag=True, help="Only check whether VMs can run on this host, and report what is missing.")
@click.option("--dry-run", is_flag=True, help="Print the units and the steps, without executing them.")
@click.option("--uninstall", is_flag=True, help="Remove the service; files of VMs are kept.")
@click.option("--stop-vms", is_flag=True, help="With --uninstall: shut down running guests.")
@click.option("--purge", is_flag=True, help="With --uninstall: also remove the database, disks, logs and the cache.")
@common()
@pass_options
def group(options: Options, check: bool, dry_run: bool, uninstall: bool, stop_vms: bool, purge: bool) -> int:
    """Install volantd as a systemd service, and start it.

    You can run it again, for example after an upgrade: running VMs keep running.

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
        # The socket unit decides the addresses.
        if not uninstall and (addresses := settings().get("VOLANT_API_LISTEN_ADDR")):
            out.note(
                f"VOLANT_API_LISTEN_ADDR={addresses} in {ENVIRONMENT} does nothing here: systemd opens the sockets; "
                "set the addresses with `systemctl edit volantd.socket`"
            )
        steps = _removal(purge) if uninstall else _installation()
        if dry_run:
            for step in steps:
                out.line(f"# {step}")
            return 0
        _check("remove" if uninstall else "install")
        if uninstall and not stop_vms:
            _check_no_vms()
        try:
            for step in steps:
                if (done := step.do()) is not None:
                    out.note(done)
        except OSError as error:
            raise Failure(f"{error.filename}: {error.strerror}") from error
        if options.json:
            out.document({"installed": not uninstall, "units": list(UNITS)})
        else:
            out.line("volantd is removed" if uninstall else "volantd runs; `volar system status` shows its state")
        return 0

    return guarded(options, work)
