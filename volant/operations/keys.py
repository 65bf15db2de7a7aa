"""Named API keys, and sessions of browsers. They are for people; models have no tools for them."""

from __future__ import annotations

from volant.http import Nothing
from volant.model import (
    ApiKeyView,
    AuthView,
    CreateApiKey,
    FinishSignIn,
    NewApiKey,
    NewSessionView,
    NewSignInView,
    Permission,
    RotateApiKey,
    SessionView,
    SignInWithKey,
)

from ._context import Context
from ._table import TABLE, Answer

_KEY = "/api/v1/keys/{name}"


@TABLE.operation("GET /api/v1/auth", permission=Permission.PUBLIC, answer="The authentication methods")
async def get_auth(context: Context) -> AuthView:
    """Get the authentication methods: whether the daemon requires credentials, and where to sign in."""
    access = context.deps.access
    return AuthView(required=access.asks_for_key, sign_in=access.sign_in, browser_sign_in=access.signs_in_browsers)


@TABLE.operation("GET /api/v1/keys", permission=Permission.ADMIN, answer="The keys, by name")
async def list_keys(context: Context) -> list[ApiKeyView]:
    """List API keys: the role of each, and when and from where it was last used. No key itself is shown."""
    return context.deps.keys.views()


@TABLE.operation(
    "POST /api/v1/keys",
    permission=Permission.ADMIN,
    status=201,
    answer="The key, which is never shown again",
    errors=(404, 409, 503),
    secret=True,
    journaled=True,
    examples={"For 30 days": {"name": "ci", "role": "operator", "expires_in_s": 2592000}},
)
async def create_key(context: Context, *, body: CreateApiKey) -> NewApiKey:
    """Create an API key with a role, and show it once.

    The first key must be an administrator's, unless the daemon's settings have one. From then on clients over TCP need
    a key, also after a restart.
    """
    has_administrator = context.deps.access.has_administrator
    return await context.deps.keys.create(body, by=str(context.caller), has_administrator=has_administrator)


@TABLE.operation(f"GET {_KEY}", permission=Permission.ADMIN, answer="The key, without the key itself")
async def get_key(context: Context, name: str) -> ApiKeyView:
    """Get an API key: its role, and when and from where it was last used."""
    return context.deps.keys.view(name)


@TABLE.operation(
    f"DELETE {_KEY}", permission=Permission.ADMIN, answer="The key is deleted", errors=(409, 503), journaled=True
)
async def delete_key(context: Context, name: str) -> None:
    """Delete an API key, and end its requests and streams.

    409 if it is the last administrator's key and the daemon's settings have none.
    """
    has_administrator = context.deps.access.has_administrator
    await context.deps.keys.delete(name, by=str(context.caller), has_administrator=has_administrator)


@TABLE.operation(
    f"POST {_KEY}/rotate",
    permission=Permission.ADMIN,
    answer="The new key, which is never shown again",
    errors=(503,),
    secret=True,
    journaled=True,
    examples={"With an hour to change it": {"overlap_s": 3600}},
)
async def rotate_key(context: Context, name: str, *, body: RotateApiKey = RotateApiKey()) -> NewApiKey:  # noqa: B008 - frozen
    """Replace an API key by a new one with the same name, role and project, and show it once.

    Without an overlap, the present key becomes invalid at once, and its requests and streams end.
    """
    return await context.deps.keys.rotate(name, body, by=str(context.caller))


TABLE.declare(
    "POST /api/v1/session",
    "sign_in",
    Permission.PUBLIC,
    "Sign in a browser with a key or a token",
    answers={201: Answer("The session", NewSessionView, headers=("Set-Cookie",))},
    body=SignInWithKey,
    examples={"A key": {"key": "vlt_…"}},
    errors=(401, 409, 503),
    details="A session has two parts: a cookie that scripts can't read, and `proof`, which the page sends as "
    "`Volant-Session`. For streams, which can't set headers, the page requests tickets. The session ends after 12 "
    "hours, with its key, and with the daemon. 409 if no key is required.",
    secret=True,
)
TABLE.declare(
    "POST /api/v1/session/oidc",
    "begin_sign_in",
    Permission.PUBLIC,
    "Start signing in a browser at the issuer",
    answers={201: Answer("The issuer's URL for the browser", NewSignInView, headers=("Set-Cookie",))},
    body=Nothing,
    errors=(409, 503),
    details="Uses the authorization code flow with PKCE. The daemon exchanges the code, so the page gets no token. The "
    "attempt has two parts like a session: a cookie, and `proof`, which the page keeps. It expires after 5 minutes. "
    "409 if no key is required, or there is no issuer for browsers.",
    secret=True,
)
TABLE.declare(
    "GET /api/v1/session/oidc/callback",
    "take_issuer_answer",
    Permission.PUBLIC,
    "Receive the browser from the issuer",
    answers={303: Answer("Redirects to the console, whatever the issuer's answer", headers=("Location",))},
    details="This is the redirect URI to register at the issuer. The parameters are the issuer's (`code`, `state`, "
    "`iss`, `error`). They are valid once, in the browser that started the sign-in. `POST /api/v1/session/oidc/finish` "
    "reports the result.",
)
TABLE.declare(
    "POST /api/v1/session/oidc/finish",
    "finish_sign_in",
    Permission.PUBLIC,
    "Finish a sign-in at the issuer and begin the session",
    answers={201: Answer("The session", NewSessionView, headers=("Set-Cookie",))},
    body=FinishSignIn,
    examples={"After the issuer": {"proof": "…"}},
    errors=(401, 409, 503),
    details="Call it once, within a minute after the issuer's answer, with both parts of the attempt. The session ends "
    "with the issuer's token. 401: the sign-in failed or took too long; 403: it was denied, or no rule of the daemon "
    "gives the caller a role; 409: the issuer has not answered yet; 503: the issuer can't be reached.",
    secret=True,
)
TABLE.declare(
    "GET /api/v1/session",
    "get_session",
    Permission.VIEW,
    "Show the client's identity and rights",
    answers={200: Answer("The caller", SessionView)},
    details="Works for all kinds of callers, also without a session.",
)
TABLE.declare(
    "DELETE /api/v1/session",
    "sign_out",
    Permission.VIEW,
    "Sign out a browser",
    answers={204: Answer("The session has ended, with its requests and streams", headers=("Set-Cookie",))},
    body=Nothing,
    details="Does nothing for a caller without a session.",
)
