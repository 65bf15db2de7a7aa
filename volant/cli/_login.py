"""`volar login` and `volar logout`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from volant.client._plain import PlainClient, run_plain

from . import _tokens
from ._options import Options, common, pass_options
from ._output import Output
from ._run import Failure, guarded
from ._target import target_of
from ._text import safe

if TYPE_CHECKING:
    from ._sign_in import DeviceCode


@click.command("login")
@common()
@pass_options
def login(options: Options) -> int:
    """Sign in to a daemon at its OpenID Connect issuer.

    The command prints a URL and a code: open the URL on any device, and enter the code. The token is stored in
    ~/.config/volant/tokens.json, which only you can read, and is renewed when it expires. Commands with an API key
    don't use the token.
    """
    return guarded(options, lambda: _login(options))


def _login(options: Options) -> None:
    from ._sign_in import IssuerClient

    target = target_of(options, signed_in=False)
    if target.address.startswith("unix:"):
        raise Failure("a daemon at a Unix socket needs no sign-in", hint="name another daemon with --remote or --api")
    client = PlainClient(target.address, tls=target.tls)
    sign_in = run_plain(client.auth.get()).sign_in
    if sign_in is None:
        raise Failure(f"{target.address} accepts no tokens", hint="its administrator has to set oidc_issuer")

    def show(code: DeviceCode) -> None:
        click.echo(f"Sign in at {safe(sign_in.issuer)} for the client {safe(sign_in.client_id)}.", err=True)
        click.echo(f"Open {safe(code.verification_uri)} and enter the code {safe(code.user_code)}", err=True)
        if code.verification_uri_complete:
            click.echo(f"or open {safe(code.verification_uri_complete)}", err=True)

    with IssuerClient(sign_in) as issuer:
        granted = issuer.sign_in(show)
    if granted.id_token is None:
        raise Failure("the issuer sent no ID token", hint="the daemon's setting oidc_scopes has to contain openid")
    # Check the token now: without a role, every command would fail with it.
    run_plain(PlainClient(target.address, api_key=granted.id_token, tls=target.tls).projects.list())
    _tokens.save(target.address, _tokens.Login(sign_in, granted.id_token, granted.refresh_token))
    Output(options.json).result({"address": target.address, "issuer": sign_in.issuer}, f"signed in to {target.address}")


@click.command("logout")
@common()
@pass_options
def logout(options: Options) -> int:
    """Remove the stored token of `volar login`. You stay signed in at the issuer."""

    def work() -> None:
        address = target_of(options, signed_in=False).address
        if address not in _tokens.load():
            raise Failure(f"you are not signed in to {address}")
        _tokens.save(address, None)
        Output(options.json).result({"address": address}, f"signed out of {address}")

    return guarded(options, work)
