"""Sessions of browsers that have signed in, which replace the key in a page.

A session has two parts. The *cookie* is hidden from scripts, and the browser sends it automatically, to every port of
the host, as cookies ignore ports. The *proof* is kept by the page, in the storage of its own origin, and sent in a
header. Neither is valid alone. So a server on another port of the host, which may be a guest's, can't use the cookies
that it receives; a proof that a script of the page steals is useless elsewhere; and forms and links of other pages have
no effect, as they can't send the header.

A *grant* opens one port of one VM at the origin of that port, and has only a cookie: the scripts there are the guest's,
and it opens only that guest.

Sessions are kept in memory, as digests, and end with the daemon.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec
import trio

from volant.model import Caller, Problem

from ._keys import digest_of

SESSION_S = 12 * 3600.0
"""How long a session lasts: a working day."""
MAX_SESSIONS = 10_000
"""Maximum sessions of all callers."""
MAX_SESSIONS_OF_ONE = 50
"""Maximum sessions per caller; another one ends the oldest."""
OF_SESSION = "session:"
"""The prefix of the credentials of callers with a session."""

_ENDED = "this session has ended"


class NewSession(msgspec.Struct, frozen=True):
    """A new session, for a browser that has signed in."""

    cookie: str
    proof: str
    caller: Caller


Place = tuple[int, int]
"""The id of a VM and one of its ports."""


class _Session(msgspec.Struct, frozen=True):
    proof: bytes | None
    """None for a grant."""
    place: Place | None
    """The place of a grant."""
    expires_at: float
    """The expiry, on Trio's clock."""
    caller: Caller
    """The caller that signed in or received the grant, with its own credentials."""


class Sessions:
    """The sessions of this daemon."""

    def __init__(self, recheck: Callable[[], None], limit: int = MAX_SESSIONS) -> None:
        """Creates it. `recheck` ends the requests of callers whose sessions have ended."""
        self._recheck = recheck
        self._limit = limit
        # By the digest of the cookie, in the order in which they expire, because all have the same lifetime.
        self._kept: dict[bytes, _Session] = {}
        self._first = trio.Event()

    def open(self, caller: Caller) -> NewSession:
        """Begins a session for a caller that has presented its credentials.

        :raises Problem: 503, there are too many sessions.
        """
        cookie, proof = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        kept = self._keep(cookie, caller, digest_of(proof.encode()), None)
        return NewSession(cookie, proof, kept)

    def grant(self, caller: Caller, place: Place) -> str:
        """Begins a grant, and returns its cookie. :raises Problem: see `open`."""
        cookie = secrets.token_urlsafe(32)
        self._keep(cookie, caller, None, place)
        return cookie

    def _keep(self, cookie: str, caller: Caller, proof: bytes | None, place: Place | None) -> Caller:
        self._remove_expired()
        own = [
            digest
            for digest, session in self._kept.items()
            if session.caller.id == caller.id and (session.place is None) is (place is None)
        ]
        surplus = own[: max(0, len(own) + 1 - MAX_SESSIONS_OF_ONE)]
        for digest in surplus:
            del self._kept[digest]
        if surplus:
            self._recheck()
        if len(self._kept) >= self._limit:
            raise Problem(503, "too-many-sessions", f"there are {self._limit} sessions", hint="sign out of some")
        digest = digest_of(cookie.encode())
        session = _Session(proof, place, trio.current_time() + SESSION_S, caller)
        self._kept[digest] = session
        self._first.set()
        return _caller_of(digest, session)

    def find(self, cookie: bytes, proof: bytes) -> Caller | None:
        """Returns the caller of a session; None if it has ended, or the parts don't belong together."""
        digest = digest_of(cookie)
        session = self._valid(digest)
        if session is None or session.proof is None or not secrets.compare_digest(session.proof, digest_of(proof)):
            return None
        return _caller_of(digest, session)

    def find_grant(self, cookie: bytes, place: Place) -> Caller | None:
        """Returns the caller of a grant; None if it has ended, or is for another place."""
        digest = digest_of(cookie)
        session = self._valid(digest)
        return None if session is None or session.place != place else _caller_of(digest, session)

    def close(self, credential: str) -> None:
        """Ends the session with this credential, if there is one, including its requests and streams."""
        self._kept.pop(_digest(credential), None)
        self._recheck()

    def left_s(self, credential: str, left_s: Callable[[Caller], float]) -> float:
        """Returns the remaining seconds of a session; 0 if it has ended.

        :param left_s: returns the minimum remaining seconds of the credentials with which a caller has signed in
        """
        session = self._kept.get(_digest(credential))
        return (
            0.0 if session is None else max(0.0, min(session.expires_at - trio.current_time(), left_s(session.caller)))
        )

    def ended(self, credential: str, ended: Callable[[Caller], str | None]) -> str | None:
        """Returns why a session has ended; None if it has not.

        :param ended: returns why the credentials with which a caller has signed in are not valid any more
        """
        session = self._valid(_digest(credential))
        return _ENDED if session is None else ended(session.caller)

    async def keep(self) -> None:
        """Ends sessions when they expire, including their requests and streams."""
        while True:
            while not self._kept:
                self._first = trio.Event()
                await self._first.wait()
            await trio.sleep_until(next(iter(self._kept.values())).expires_at)
            self._remove_expired()
            self._recheck()

    def _valid(self, digest: bytes) -> _Session | None:
        session = self._kept.get(digest)
        return None if session is None or trio.current_time() >= session.expires_at else session

    def _remove_expired(self) -> None:
        now = trio.current_time()
        while self._kept and self._kept[oldest := next(iter(self._kept))].expires_at <= now:
            del self._kept[oldest]


def _caller_of(digest: bytes, session: _Session) -> Caller:
    return msgspec.structs.replace(session.caller, credential=f"{OF_SESSION}{digest.hex()}")


def _digest(credential: str) -> bytes:
    return bytes.fromhex(credential.removeprefix(OF_SESSION))
