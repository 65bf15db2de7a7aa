"""`volar fleet join` and `volar fleet leave`: add this host to a fleet, and remove it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from volant.client import Unreachable
from volant.model import Problem
from volant.model.doctor import FleetReport

from . import _setup
from ._options import Options, common, pass_options
from ._output import Output
from ._run import Failure, guarded, plain_client_of
from ._settings_file import SettingsFile, find
from ._text import safe

_PREFIX = "fleet_"
_CHECK_S = 60.0
_FILES = ("cert", "key", "ca", "etcd_password_file")
_config = click.option("--config", metavar="FILE", help="The file of `volantd --config` (default: the service's file).")


@click.command(name="join")
@click.option("--etcd", required=True, metavar="URLS", help="The members of etcd: https://etcd1:2379,https://…")
@click.option("--listen", required=True, metavar="HOST:PORT", help="The address to listen on for other hosts.")
@click.option("--address", metavar="HOST:PORT", help="The address at which other hosts reach it.  [default: --listen]")
@click.option("--cert", required=True, metavar="FILE", help="Certificate of this host, valid for servers and clients.")
@click.option("--key", metavar="FILE", help="Its private key.  [default: in --cert]")
@click.option("--ca", required=True, metavar="FILE", help="CA certificates that sign only the fleet's hosts and etcd.")
@click.option("--host", metavar="NAME", help="Name of this host in the fleet.  [default: the host name]")
@click.option("--zone", metavar="NAME", help="Zone of this host, such as a rack.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of this host; may be repeated.")
@click.option("--etcd-user", metavar="NAME", help="User of etcd, if it requires one.")
@click.option("--etcd-password-file", metavar="FILE", help="The file with its password.")
@click.option("--prefix", metavar="TEXT", help="Prefix of the fleet's keys in etcd.  [default: volant/]")
@_config
@common(host=False)
@pass_options
def join(options: Options, /, config: str | None, labels: tuple[str, ...], **given: str | None) -> int:
    """Add this host to a fleet: check everything, then write the settings.

    It checks certificates, etcd and the name. The settings take effect when you restart volantd; VMs keep running.
    You can run it again to change them.
    """

    def work() -> int:
        file = find(config)
        _check_others(file)
        settings = _settings({**given, "labels": ",".join(labels)})
        if file.service:
            _check_visible(settings)
        text = file.candidate(settings)
        report = _ask(file, text)
        changed = file.write(text)
        out = Output(options.json)
        if options.json:
            out.document({**msgspec.structs.asdict(report), "settings": str(file.path), "changed": changed})
        elif not changed:
            out.line(f"{file.path} has these settings already")
        else:
            others = [safe(name) for name in report.hosts if name != report.host]
            with_whom = f"with {', '.join(others)}" if others else "as its first host"
            out.line(f"host {safe(report.host)} can be one of the fleet, {with_whom}; wrote {file.path}")
            _say_restart(out, file)
        return 0

    return guarded(options, work)


@click.command(name="leave")
@click.option("--keep-vms", is_flag=True, help="Keep its VMs, snapshots and volumes on this host.")
@_config
@common()
@pass_options
def leave(options: Options, config: str | None, keep_vms: bool) -> int:
    """Remove this host from its fleet, and remove the settings.

    The fleet forgets the host and its objects, whose names become free. VMs keep running. Restart volantd afterwards.
    """

    def work() -> int:
        file = find(config)
        _check_others(file)
        out = Output(options.json)
        was_in = _leave(options, keep_vms)
        changed = file.write(file.candidate({}))
        if options.json:
            out.document({"left": was_in, "settings": str(file.path), "changed": changed})
            return 0
        out.line("the fleet does not know this host any more" if was_in else "this host is in no fleet")
        if changed:
            out.line(f"removed the settings from {file.path}")
        if changed or was_in:
            _say_restart(out, file)
        return 0

    return guarded(options, work)


def _leave(options: Options, keep_vms: bool) -> bool:
    """Makes the daemon leave the fleet; returns whether it was in one."""
    from volant.client._plain import run_plain

    try:
        run_plain(plain_client_of(options).fleet.leave(keep_vms=keep_vms))
    except Problem as problem:
        if problem.code == "no-fleet":
            return False
        raise
    except Unreachable as error:
        raise Failure(
            f"{error.detail}; only a running volantd can leave its fleet",
            hint="start it; or, if the host is gone for good, run `volar hosts delete` for it on another host",
        ) from None
    return True


def _settings(given: Mapping[str, str | None]) -> dict[str, str]:
    """Returns the settings by name. The daemon may have another working directory, so paths become absolute."""
    return {
        f"{_PREFIX}{name}": str(Path(value).absolute()) if name in _FILES else value
        for name, value in given.items()
        if value
    }


def _check_others(file: SettingsFile) -> None:
    """Checks that no setting of the fleet was written by someone else. :raises Failure: one was."""
    if others := file.others(_PREFIX):
        raise Failure(
            f"{file.path} has {', '.join(others)}, which `volar fleet join` has not written",
            hint="remove these lines; what they say can be options of `volar fleet join`",
        )


def _check_visible(settings: Mapping[str, str]) -> None:
    """Checks that the service can see the files. :raises Failure: it would not find one."""
    for name in _FILES:
        path = settings.get(f"{_PREFIX}{name}")
        if path and any(Path(path).resolve().is_relative_to(hidden) for hidden in _setup.HIDDEN):
            raise Failure(
                f"the service can't read {path}, as its sandbox hides that directory",
                hint="move the file to /etc/volant, for example",
            )


def _ask(file: SettingsFile, text: str) -> FleetReport:
    """Lets volantd check the new settings of the file. :raises Failure: they are invalid."""
    program = _setup.command_of("volantd", "volant.daemon.main")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VOLANT_FLEET_")}
    arguments: list[Any] = ["--config", "/dev/stdin"] if file.toml else []
    try:
        done = subprocess.run(
            [*program, "check-fleet", *arguments], env={**inherited, **file.environ(text)},
            input=text if file.toml else "", capture_output=True, text=True, timeout=_CHECK_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failure(f"`{' '.join(program)} check-fleet` takes longer than {_CHECK_S:g} s") from None
    if done.returncode:
        message = done.stderr.strip().rpartition("volantd: ")[2] or f"volantd check-fleet ends with {done.returncode}"
        raise Failure(message[-2000:].replace("/dev/stdin", str(file.path)), hint="nothing was changed")
    return msgspec.json.decode(done.stdout, type=FleetReport)


def _say_restart(out: Output, file: SettingsFile) -> None:
    if file.service:
        how = "run `systemctl restart volantd.service`"
    elif file.toml:
        how = f"stop volantd and run `volantd --config {file.path}`"
    else:
        how = f"stop volantd and run it with the variables of {file.path}"
    out.line(f"to apply this, {how}; VMs keep running")
