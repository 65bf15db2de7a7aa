"""Sign-ins of browsers at an issuer, from the click until the page has its session.

An attempt has two halves, as the session has that it leads to: a *cookie* that is hidden from scripts, and a *proof*
that the page keeps. The issuer's answer counts only in the browser with the cookie, so nobody is signed in by a link
that another person has begun. And what it leads to is given only to the page with the proof: cookies know no ports, so
a server on another port of the host, which may be a guest's, gets the cookie. Neither half stands in any URL.

Attempts are kept in memory, for minutes, and the halves as digests.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

import msgspec
import trio

from volant.model import Caller, Problem

from ._keys import CodeRequest, digest_of

ATTEMPT_S = 300.0
"""How long a person may take at the issuer."""
FINISH_S = 60.0
"""How long the page may take to get what the issuer's answer has led to: it does so at once."""
MAX_ATTEMPTS = 500
"""Most attempts of all browsers; one more drops the oldest. Anybody can begin one."""
MAX_ATTEMPTS_OF_ONE = 100
"""Most attempts of one address, behind which there may be many people; one more drops its oldest."""
MAX_EXCHANGES = 32
"""Most answers of the issuer that are checked at the same time, each of which is a request to it."""


class NewAttempt(msgspec.Struct, frozen=True):
    """What a browser gets when it begins to sign in."""

    cookie: str
    proof: str
    url: str
    """Where it goes on, at the issuer."""


class _Attempt(msgspec.Struct):
    proof: bytes
    address: str
    expires_at: float
    """On Trio's clock."""
    request: CodeRequest | None
    """None: the issuer's answer came."""
    outcome: Caller | Problem | None = None
    """Of the issuer's answer; None: it is not known yet."""


class SignIns:
    """The attempts to sign in at this daemon."""

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
        """Takes the answer of the issuer, once. What it leads to is for `finish`, errors too.

        Nothing happens unless it is the answer to an attempt of this browser.

        :param answer: the parameters that the issuer's redirect has brought
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

        :raises Problem: 401 there is no such attempt; 409 the issuer's answer is still to come; any other as
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
    """Whether two texts are the same; takes the same time for any."""
    return secrets.compare_digest(digest_of(one), digest_of(other))
