"""`/api/v1/session`: browsers sign in and out. The routes are streams because their answers set cookies."""

from __future__ import annotations

import re
from collections import Counter
from datetime import timedelta
from urllib.parse import parse_qsl

import msgspec

from volant.http import ATTEMPT_S, JSON, Call, Header, Limits, NewSession, Nothing, StreamRoute, read_call_body
from volant.model import (
    Caller,
    FinishSignIn,
    NewSessionView,
    NewSignInView,
    Permission,
    SessionView,
    SignInWithKey,
)
from volant.operations import ApiDeps

_PATH = re.compile(r"/api/v1/session\Z")
_BEGIN = re.compile(r"/api/v1/session/oidc\Z")
_CALLBACK = re.compile(r"/api/v1/session/oidc/callback\Z")
_FINISH = re.compile(r"/api/v1/session/oidc/finish\Z")
_TAKEN = frozenset({"code", "state", "iss", "error", "error_description"})
_MAX_PARAMETERS = 50
_CONSOLE = b"/#/"
"""The console's path. The empty fragment keeps browsers from appending a fragment that the issuer may have added."""


def routes(deps: ApiDeps, limits: Limits) -> list[StreamRoute]:
    """Returns the routes of this resource."""
    access = deps.access

    def view(caller: Caller) -> SessionView:
        left_s = access.session_left_s(caller)
        return SessionView(
            caller=caller.name,
            role=caller.role,
            project=caller.project,
            permissions=tuple(one for one in Permission if caller.may(one)),
            signed_in=left_s is not None,
            expires_at=None if left_s is None else deps.host.clock.now() + timedelta(seconds=left_s),
        )

    async def begun(call: Call, new: NewSession, *more: bytes) -> None:
        shown = NewSessionView(**msgspec.structs.asdict(view(new.caller)), proof=new.proof)
        left_s = access.session_left_s(new.caller) or 0.0
        await _answer(call, 201, shown, access.cookie(call.scope, new.cookie, left_s), *more)

    async def session(call: Call) -> None:
        call.query(credentials=False).done()
        caller = call.caller
        assert caller is not None
        if call.method == "POST":
            wanted = await read_call_body(call, SignInWithKey, limits)
            await begun(call, await access.sign_in_with(call.scope, wanted.key))
        elif call.method == "DELETE":
            await read_call_body(call, Nothing, limits)
            # The answer first, as this request ends with the session.
            headers = [(b"set-cookie", access.cookie(call.scope, "", 0.0)), (b"cache-control", b"no-store")]
            await call.reject(204, headers, b"")
            access.sign_out(caller)
        else:
            await _answer(call, 200, view(caller))

    async def begin(call: Call) -> None:
        call.query(credentials=False).done()
        await read_call_body(call, Nothing, limits)
        new = await access.begin_sign_in(call.scope)
        cookie = access.attempt_cookie(call.scope, new.cookie, ATTEMPT_S)
        await _answer(call, 201, NewSignInView(new.url, new.proof), cookie)

    async def callback(call: Call) -> None:
        await access.take_answer(call.scope, _parameters(call.scope["query_string"]))
        # The browser leaves this address behind, with the code in it.
        headers = [
            (b"location", _CONSOLE),
            (b"cache-control", b"no-store"),
            (b"referrer-policy", b"no-referrer"),
            (b"content-length", b"0"),
        ]
        await call.reject(303, headers, b"")

    async def finish(call: Call) -> None:
        call.query(credentials=False).done()
        wanted = await read_call_body(call, FinishSignIn, limits)
        new = access.finish_sign_in(call.scope, wanted.proof)
        await begun(call, new, access.attempt_cookie(call.scope, "", 0.0))

    posted = frozenset({"POST"})
    return [
        StreamRoute(_PATH, session, methods=frozenset({"GET", "HEAD", "POST", "DELETE"})),
        StreamRoute(_BEGIN, begin, methods=posted),
        # A code counts once, so this is no HEAD.
        StreamRoute(_CALLBACK, callback, methods=frozenset({"GET"}), query_is_guests=True),
        StreamRoute(_FINISH, finish, methods=posted),
    ]


def _parameters(query: bytes) -> dict[str, str]:
    """Returns the parameters of an issuer's answer; unknown ones are ignored, and all if one is repeated (RFC 6749,
    3.1)."""
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_PARAMETERS)
    except ValueError:
        return {}
    taken = [(name, value) for name, value in pairs if name in _TAKEN]
    return dict(taken) if max(Counter(name for name, _ in taken).values(), default=0) <= 1 else {}


async def _answer(call: Call, status: int, shown: SessionView | NewSignInView, *cookies: bytes) -> None:
    body = msgspec.json.encode(shown)
    headers: list[Header] = [
        (b"content-type", JSON.encode()),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *((b"set-cookie", cookie) for cookie in cookies),
    ]
    await call.reject(status, headers, b"" if call.method == "HEAD" else body)
