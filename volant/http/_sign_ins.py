"""Sign-ins of browsers at an issuer, from the first click to the page's session.

An attempt has two parts, like a session: a *cookie* that is hidden from scripts, and a *proof* that the page keeps. The
issuer's answer is only valid in the browser with the cookie, so a link from another person's attempt signs in no one.
The resulting session is only given to the page with the proof: cookies ignore ports, so a server on another port of the
host, which may be a guest's, receives the cookie. Neither part is in any URL.

Attempts are kept in memory for minutes, and their parts as digests.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

import msgspec
import trio

from volant.model import Caller, Problem

from ._keys import CodeRequest, digest_of

ATTEMPT_S = 300.0
"""How long a user may take at the issuer."""
FINISH_S = 60.0
"""How long the page may take to fetch the result of the issuer's answer, which it does at once."""
MAX_ATTEMPTS = 500
"""Maximum attempts of all browsers; another one drops the oldest. Any client can begin one."""
MAX_ATTEMPTS_OF_ONE = 100
"""Maximum attempts per address, which many users may share; another one drops its oldest."""
MAX_EXCHANGES = 32
"""Maximum answers of the issuer that are checked at the same time, each with a request to it."""


class NewAttempt(msgspec.Struct, frozen=True):
    """A new attempt, for the browser."""

    cookie: str
    proof: str
    url: str
    """The issuer's URL to which the browser goes next."""


class _Attempt(msgspec.Struct):
    proof: bytes
    address: str
    expires_at: float
    """The expiry, on Trio's clock."""
    request: CodeRequest | None
    """The request to the issuer; None once its answer has arrived."""
    outcome: Caller | Problem | None = None
    """The result of the issuer's answer; None until it is known."""


class SignIns:
    """The attempts to sign in to this daemon."""

    def __init__(self) -> None:
        # By the digest of the cookie, in the order in which they began.
        self._kept: dict[bytes, _Attempt] = {}
        self._exchanges = 0

    def begin(self, request: CodeRequest, address: str) -> NewAttempt:
        """Begins an attempt of a browser at this address."""
        now = trio.current_time()
        self._kept = {digest: each for digest, each in self._kept.items() if each.expires_at > now}
        own = [digest for digest, each in self._kept.items() if each.address == address]
        if len(own) >= MAX_ATTEMPTS_OF_ONE:
            del self._kept[own[0]]
        elif len(self._kept) >= MAX_ATTEMPTS:
            del self._kept[next(iter(self._kept))]
        cookie, proof = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        attempt = _Attempt(digest_of(proof.encode()), address, now + ATTEMPT_S, request)
        self._kept[digest_of(cookie.encode())] = attempt
        return NewAttempt(cookie, proof, request.url)

    async def take(self, cookies: Iterable[bytes], answer: Mapping[str, str]) -> None:
        """Handles the issuer's answer, once. `finish` returns the result, including errors.

        An answer that belongs to no attempt of this browser is ignored.

        :param answer: the parameters of the issuer's redirect
        """
        state = answer.get("state", "").encode()
        for cookie in cookies:
            attempt = self._find(cookie)
            request = None if attempt is None else attempt.request
            if attempt is not None and request is not None and _same(request.state.encode(), state):
                attempt.request = None
                attempt.outcome = await self._outcome(request, answer, attempt.address)
                attempt.expires_at = trio.current_time() + FINISH_S
                return

    async def _outcome(self, request: CodeRequest, answer: Mapping[str, str], address: str) -> Caller | Problem:
        if self._exchanges >= MAX_EXCHANGES:
            return Problem(
                503, "too-many-sign-ins", f"{MAX_EXCHANGES} sign-ins are being checked", hint="sign in again",
                retry_after_s=1,
            )  # fmt: skip
        self._exchanges += 1
        try:
            return await request.finish(answer, address)
        except Problem as problem:
            return problem
        finally:
            self._exchanges -= 1

    def finish(self, cookies: Iterable[bytes], proof: str) -> Caller:
        """Returns the caller that has signed in, once.

        :raises Problem: 401, there is no such attempt; 409, the issuer has not answered yet; others see
            `CodeRequest.finish`.
        """
        given = digest_of(proof.encode())
        for cookie in cookies:
            attempt = self._find(cookie)
            if attempt is None or not secrets.compare_digest(attempt.proof, given):
                continue
            if attempt.outcome is None:
                raise Problem(409, "sign-in-unfinished", "the issuer has not answered yet", hint="go on at the issuer")
            del self._kept[digest_of(cookie)]
            if isinstance(attempt.outcome, Problem):
                raise attempt.outcome
            return attempt.outcome
        raise Problem(
            401, "sign-in-ended", "this sign-in took too long, or was begun in another browser", hint="sign in again"
        )

    def _find(self, cookie: bytes) -> _Attempt | None:
        attempt = self._kept.get(digest_of(cookie))
        return None if attempt is None or trio.current_time() >= attempt.expires_at else attempt


def _same(one: bytes, other: bytes) -> bool:
    """Returns whether two texts are equal, in constant time."""
    return secrets.compare_digest(digest_of(one), digest_of(other))
