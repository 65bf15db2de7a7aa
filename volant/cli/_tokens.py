"""Stores the tokens of `volar login` by the address of their daemon, and renews them.

They are in `tokens.json` beside the remotes, which only this user can read. One process at a time renews an expired
token with the refresh token, because issuers accept a refresh token only once.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Mapping

import click
import msgspec

from volant.model import SignIn

from ._target import tokens_file
from ._user_files import locked, replace_file

_EARLY_S = 30.0
"""How long before its expiry a token is renewed, because a request with it takes a while."""
_MAX_FILE = 4 * 1024 * 1024


class Login(msgspec.Struct, frozen=True):
    """A sign-in for one daemon."""

    sign_in: SignIn
    id_token: str
    refresh_token: str | None = None


def load() -> dict[str, Login]:
    """Returns all sign-ins. :raises click.UsageError: the file can't be read, or has other contents."""
    path = tokens_file()
    try:
        with path.open("rb") as opened:
            return msgspec.json.decode(opened.read(_MAX_FILE), type=dict[str, Login])
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise click.UsageError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is damaged: {error}; remove it and run `volar login`") from None


def save(address: str, login: Login | None) -> None:
    """Stores the sign-in for a daemon; None removes it. :raises click.UsageError: the file can't be written."""
    with locked(tokens_file()):
        _write(address, login)


def token_for(address: str) -> str | None:
    """Returns the token for a daemon, and renews it if it has expired; None if the user has not signed in.

    :raises click.ClickException: it has expired and can't be renewed.
    """
    login = load().get(address)
    if login is None or not _has_expired(login):
        return None if login is None else login.id_token
    with locked(tokens_file()):
        login = load().get(address)  # Another process may have renewed it meanwhile.
        if login is None or not _has_expired(login):
            return None if login is None else login.id_token
        login = _refreshed(login)
        _write(address, login)
        return login.id_token


def _refreshed(login: Login) -> Login:
    from ._run import Failure
    from ._sign_in import IssuerClient, Refused

    ended = "the sign-in has expired; run `volar login`"
    if login.refresh_token is None:
        raise click.ClickException(ended)
    try:
        with IssuerClient(login.sign_in) as issuer:
            granted = issuer.refresh(login.refresh_token)
    except Refused as refused:
        raise click.ClickException(f"{ended} ({refused})") from None
    except Failure as failure:
        raise click.ClickException(f"the token has expired, and {failure.detail}") from None
    if granted.id_token is None:
        raise click.ClickException(ended)
    return Login(login.sign_in, granted.id_token, granted.refresh_token or login.refresh_token)


def _has_expired(login: Login) -> bool:
    """Returns whether a token has expired or soon will. The daemon verifies tokens; this only avoids a request that
    fails."""
    try:
        payload = login.id_token.split(".")[1]
        claims = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"]) - _EARLY_S <= time.time()
    except (IndexError, KeyError, TypeError, ValueError, binascii.Error):
        return True


def _write(address: str, login: Login | None) -> None:
    left: Mapping[str, Login] = {other: each for other, each in load().items() if other != address}
    replace_file(tokens_file(), {**left, **({} if login is None else {address: login})})
