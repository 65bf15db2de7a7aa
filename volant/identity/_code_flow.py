"""Signs in a user at the issuer by authorization code with PKCE (RFC 6749, RFC 7636), as the client of the issuer.

The daemon exchanges the code itself. So no page ever has a token, and the issuer needs no CORS.
"""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from typing import Any, Protocol
from urllib.parse import quote_plus, urlencode

import msgspec

from volant.model import Caller, Problem

from ._issuer import Endpoints, IssuerError

_MAX_ERROR = 300
"""Maximum length of an error of the issuer that users see."""
_OFFLINE = "offline_access"
"""The scope for a refresh token, which is not needed: signing in again is a click, as the issuer knows the browser."""


class Reply(msgspec.Struct, frozen=True):
    """An answer of an issuer, whatever its status."""

    status: int
    content: bytes


Post = Callable[[str, Mapping[str, str], tuple[str, str] | None], Awaitable[Reply]]
"""Posts a form to a URL, with or without a user and a password. Raises `IssuerError`."""
Verify = Callable[[bytes, str, str], Awaitable[Caller]]
"""Returns the caller with an ID token of this nonce, at this address. Raises `Problem`."""


class HasSecret(Protocol):
    """A text that is never shown."""

    def reveal(self) -> str:
        """Returns the text."""


class CodeClient(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's client at the issuer."""

    issuer: str
    client_id: str
    secret: HasSecret | None
    """None for a public client."""
    scopes: str


class CodeFlow:
    """One sign-in: its URL at the issuer, and the conversion of the issuer's answer to a caller."""

    def __init__(self, client: CodeClient, endpoints: Endpoints, redirect_uri: str, post: Post, verify: Verify) -> None:
        """Creates it. :raises Problem: 409, the issuer has no sign-in for browsers."""
        if endpoints.authorization is None or endpoints.token is None:
            raise Problem(
                409, "no-browser-sign-in", f"the issuer {client.issuer} has no sign-in for browsers",
                hint="sign in with a key or a token",
            )  # fmt: skip
        self._client = client
        self._endpoints = endpoints
        self._token_url = endpoints.token
        self._redirect_uri = redirect_uri
        self._post = post
        self._verify = verify
        self._nonce, self._verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self.state = secrets.token_urlsafe(32)
        challenge = urlsafe_b64encode(sha256(self._verifier.encode()).digest()).rstrip(b"=").decode()
        asked = {
            "response_type": "code",
            "client_id": client.client_id,
            "redirect_uri": redirect_uri,
            "scope": _scopes(client.scopes),
            "state": self.state,
            "nonce": self._nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        # It may have a query already (RFC 6749, 3.1).
        joint = "&" if "?" in endpoints.authorization else "?"
        self.url = f"{endpoints.authorization}{joint}{urlencode(asked)}"

    async def finish(self, answer: Mapping[str, str], address: str) -> Caller:
        """Returns the caller that has signed in.

        :param answer: the parameters of the issuer's redirect
        :raises Problem: 401, the sign-in has failed; 403, it was denied, or the caller has no role; 503, the issuer
            does not answer correctly.
        """
        issuer = self._client.issuer
        given = answer.get("iss")
        if given != issuer and (given is not None or self._endpoints.names_itself):
            # Another issuer could have it sent a code that is not its own (RFC 9207).
            raise _failed(f"the answer is not of the issuer {issuer}")
        if "error" in answer:
            said = _said(answer)
            if answer["error"] == "access_denied":
                raise Problem(
                    403, "sign-in-denied", f"the issuer {issuer} denies the sign-in: {said}",
                    hint="sign in again, as a user who may use this client",
                )  # fmt: skip
            raise _failed(f"the issuer {issuer} answers with an error: {said}")
        if not answer.get("code"):
            raise _failed(f"the answer of the issuer {issuer} has no code")
        try:
            token = await self._exchange(answer["code"])
        except IssuerError as error:
            raise Problem(
                503, "issuer-unreachable", str(error), hint="sign in again; API keys work meanwhile", retry_after_s=1
            ) from None
        try:
            return await self._verify(token, self._nonce, address)
        except Problem as problem:
            if problem.status != 401:
                raise
            raise Problem(401, problem.code, problem.detail, hint="sign in again") from None

    async def _exchange(self, code: str) -> bytes:
        """Returns the ID token for a code. :raises IssuerError: there is no valid answer. :raises Problem: an error."""
        client = self._client
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._redirect_uri,
            "code_verifier": self._verifier,
        }
        login = None
        if client.secret is None:
            form["client_id"] = client.client_id
        elif self._endpoints.takes_basic:
            # RFC 6749, 2.3.1.
            login = (quote_plus(client.client_id), quote_plus(client.secret.reveal()))
        else:
            form |= {"client_id": client.client_id, "client_secret": client.secret.reveal()}
        reply = await self._post(self._token_url, form, login)
        said = _members(reply.content)
        if reply.status == 200:
            token = said.get("id_token")
            if not isinstance(token, str):
                raise _failed("the issuer has sent no ID token; the setting oidc_scopes has to contain openid")
            return token.encode()
        if reply.status in (400, 401) and isinstance(said.get("error"), str):
            raise _failed(f"the issuer {client.issuer} refuses the code: {_said(said)}")
        raise IssuerError(f"{self._token_url} answers with status {reply.status}")


def _scopes(asked: str) -> str:
    scopes = [scope for scope in asked.split() if scope != _OFFLINE]
    return " ".join(scopes if "openid" in scopes else ["openid", *scopes])


def _members(content: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (ValueError, RecursionError):
        return {}


def _said(answer: Mapping[str, Any]) -> str:
    """Returns the error of an answer for people. It is not trusted."""
    text = str(answer["error"])
    if "error_description" in answer:
        text += f": {answer['error_description']}"
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_ERROR])


def _failed(why: str) -> Problem:
    return Problem(401, "sign-in-failed", why, hint="sign in again")
