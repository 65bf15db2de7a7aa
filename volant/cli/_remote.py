"""`volar remote`: named daemons of this user."""

from __future__ import annotations

import ssl
import sys
from dataclasses import replace
from pathlib import Path

import click
import msgspec

from volant.client import Address, Tls, Unreachable
from volant.client._pinning import shown_fingerprint
from volant.client._plain import PlainClient, run_plain
from volant.client._tls import normal_fingerprint

from . import _remotes
from ._lazy_group import LazyGroup
from ._options import Options, common, listing, pass_options
from ._output import Output
from ._run import CONFLICT, Failure, guarded
from ._target import LOCAL, target_of
from ._text import safe


@click.group(name="remote", cls=LazyGroup, default="list")
def group() -> None:
    """Manage the daemons that you use by name.

    Without a command, list them; `volar --remote NAME vms list` uses one. They are stored in
    ~/.config/volant/remotes.json, with the paths of keys but not the keys.
    """


def remote_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Completes names of remotes."""
    del ctx, parameter
    try:
        return [name for name in (*_remotes.load().remotes, LOCAL) if name.startswith(incomplete)]
    except click.UsageError:
        return []


name_argument = click.argument("name", shell_complete=remote_names)


@group.command("add")
@click.argument("name")
@click.argument("url")
@click.option("--fingerprint", metavar="SHA256", help="Trust the certificate with this fingerprint, and no other.")
@common(tls=True)
@pass_options
def add(options: Options, name: str, url: str, fingerprint: str | None) -> int:
    """Add a daemon, after a request to it has succeeded.

    If its certificate is not signed by a known authority, you are asked to confirm its fingerprint; a script must pass
    it. --api-key-file, --ca-file, --client-cert and --client-key are stored with it, as paths.
    """
    return guarded(options, lambda: _add(options, name, url, fingerprint))


def _add(options: Options, name: str, url: str, fingerprint: str | None) -> None:
    _remotes.check_name(name)
    if options.api or options.remote:
        raise click.UsageError("the address is the argument URL; leave out --api and --remote")
    _check_unused(name, _remotes.load())
    try:
        address = Address.parse(url)
        pinned = None if fingerprint is None else normal_fingerprint(fingerprint)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if pinned is not None and not address.tls:
        raise click.UsageError(f"--fingerprint is of a certificate, and {url} has none; write https://")
    remote = _remotes.Remote(
        url,
        fingerprint=pinned,
        ca_file=_absolute(options.ca_file),
        client_cert=_absolute(options.client_cert),
        client_key=_absolute(options.client_key),
        api_key_file=_absolute(options.api_key_file),
    )
    try:
        version = _version(options, remote)
    except Unreachable as error:
        untrusted = isinstance(error.__cause__, ssl.SSLCertVerificationError)
        if pinned is not None or remote.ca_file is not None or not untrusted:
            raise
        remote = msgspec.structs.replace(remote, fingerprint=_trusted(options, remote))
        version = _version(options, remote)

    def edit(known: _remotes.Remotes) -> _remotes.Remotes:
        # Again, as the question may have taken a while.
        _check_unused(name, known)
        return msgspec.structs.replace(known, remotes={**known.remotes, name: remote})

    _remotes.change(edit)
    Output(options.json).result(
        {"name": name, **msgspec.to_builtins(remote)},
        f"remote {name} is added: volantd {safe(version)}; use it with --remote {name} or `volar remote use {name}`",
    )


def _check_unused(name: str, known: _remotes.Remotes) -> None:
    if name in known.remotes:
        raise Failure(f"there is a remote {name!r} already", code=CONFLICT, hint=f"`volar remote delete {name}` first")


def _version(options: Options, remote: _remotes.Remote) -> str:
    """Returns the version of the daemon. :raises ClientError: it can't be reached, or refuses the request."""
    target = target_of(replace(options, api=remote.address), remote)
    try:
        client = PlainClient(target.address, api_key=target.api_key, tls=target.tls)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return run_plain(client.system.status()).version


def _trusted(options: Options, remote: _remotes.Remote) -> str:
    """Returns the daemon's fingerprint if the user trusts it. :raises Failure: the user does not."""
    shown = shown_fingerprint(
        Address.parse(remote.address), Tls(cert_file=remote.client_cert, key_file=remote.client_key)
    )
    if options.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise Failure(
            f"the certificate of {remote.address} is not signed by an authority that this host trusts",
            hint=f"its SHA-256 fingerprint is {shown}; if the daemon prints the same, add --fingerprint {shown}",
        )
    click.echo(f"The certificate of {remote.address} is not signed by an authority that this host trusts.", err=True)
    click.echo(f"SHA-256 fingerprint: {shown}", err=True)
    click.echo("The daemon prints it at its start, and `volar system info` on its host shows it.", err=True)
    if not click.confirm("Is it the same, and do you trust it?", default=False, err=True):
        raise Failure("the certificate is not trusted, so nothing was added")
    return shown


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


@group.command("list")
@common()
@listing
@pass_options
def list_(options: Options) -> int:
    """List remotes; `*` marks the one that commands use."""

    def work() -> None:
        known = _remotes.load()
        rows = [("*" if known.current is None else "", LOCAL, "the daemon on this host", "")]
        rows += [
            ("*" if name == known.current else "", name, remote.address, _trust(remote))
            for name, remote in sorted(known.remotes.items())
        ]
        found = [
            {"name": name, "current": name == known.current, **msgspec.to_builtins(remote)}
            for name, remote in sorted(known.remotes.items())
        ]
        out = Output(options.json, options.names)
        if options.names:
            for name in known.remotes:
                out.line(name)
            return
        out.listing(found, ("", "NAME", "ADDRESS", "TRUSTED BY"), rows)

    return guarded(options, work)


def _trust(remote: _remotes.Remote) -> str:
    if not remote.address.startswith("https:"):
        return ""
    if remote.fingerprint is not None:
        return f"fingerprint {remote.fingerprint[:16]}…"
    return remote.ca_file or "the system's authorities"


@group.command("get")
@name_argument
@common()
@pass_options
def get(options: Options, name: str) -> int:
    """Show the stored data of a remote."""

    def work() -> None:
        remote = _remotes.find(name)
        facts = msgspec.structs.asdict(remote)
        Output(options.json).facts({"name": name, **facts}, [("name", name), *facts.items()])

    return guarded(options, work)


@group.command("use")
@name_argument
@common()
@pass_options
def use(options: Options, name: str) -> int:
    """Make a remote the default for commands; `local` is the daemon on this host."""

    def work() -> None:
        current = None if name == LOCAL else name

        def edit(known: _remotes.Remotes) -> _remotes.Remotes:
            if current is not None:
                _remotes.find(current)
            return msgspec.structs.replace(known, current=current)

        _remotes.change(edit)
        Output(options.json).result({"current": current}, f"commands use {name}")

    return guarded(options, work)


@group.command("delete")
@name_argument
@common()
@pass_options
def delete(options: Options, name: str) -> int:
    """Delete a remote from the list. Nothing changes on its host."""

    def work() -> None:
        def edit(known: _remotes.Remotes) -> _remotes.Remotes:
            _remotes.find(name)
            left = {other: remote for other, remote in known.remotes.items() if other != name}
            return _remotes.Remotes(left, None if known.current == name else known.current)

        _remotes.change(edit)
        Output(options.json).result({"name": name}, f"remote {name} is deleted")

    return guarded(options, work)
