"""Signs in at an OpenID Connect issuer by device code (RFC 8628), so that a user can do it on another device."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

import httpx
import msgspec

from volant.model import SignIn, is_safe_url

from ._run import TIMED_OUT, UNREACHABLE, Failure
from ._text import safe

T = TypeVar("T")

DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
_REQUEST_S = 15.0
"""Deadline for one request, from looking up the issuer's address to the last byte of the answer."""
_MAX_BYTES = 512 * 1024
_LONGEST_S = 1800.0
"""Maximum wait for a user to sign in, whatever the issuer allows."""
_INTERVAL_S = 5.0
_HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity"}
"""Headers without compression: a small answer could otherwise expand to a large one."""
_SLOWER_S = 5.0
"""The seconds that `slow_down` adds to the interval (RFC 8628, 3.5)."""
_MAX_INTERVAL_S = 60.0


class DeviceCode(msgspec.Struct):
    """The issuer's answer to a request for a code. Other members are ignored."""

    device_code: str
    user_code: str
    verification_uri: str
    expires_in: float
    interval: float = _INTERVAL_S
    verification_uri_complete: str | None = None


class Granted(msgspec.Struct):
    """Tokens from the issuer."""

    id_token: str | None = None
    refresh_token: str | None = None


class Refused(Exception):
    """An error answer of the issuer. `code` is its error code."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class IssuerClient:
    """A client of one issuer. Use it as a context manager."""

    def __init__(self, sign_in: SignIn) -> None:
        self._sign_in = sign_in
        self._http = httpx.Client(timeout=_REQUEST_S, follow_redirects=False)

    def __enter__(self) -> IssuerClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def sign_in(self, show: Callable[[DeviceCode], None]) -> Granted:
        """Returns the tokens, once the user has signed in.

        :param show: shows the user where to sign in and which code to enter
        :raises Failure: the sign-in was denied or took too long, or the issuer does not support device codes.
        """
        endpoints = self._discover()
        where = endpoints.get("device_authorization_endpoint")
        if where is None:
            raise Failure(
                f"the issuer {safe(self._sign_in.issuer)} has no sign-in by device code",
                hint="get a token in another way, and set VOLANT_API_KEY to it",
            )
        asked = {"client_id": self._sign_in.client_id, "scope": self._sign_in.scopes}
        try:
            code = _decode(self._post(_safe(where), asked), DeviceCode)
        except Refused as refused:
            raise Failure(f"the issuer refuses to make a code: {refused}") from None
        show(code)
        return self._poll(_safe(endpoints.get("token_endpoint")), code)

    def refresh(self, refresh_token: str) -> Granted:
        """Returns new tokens. :raises Refused: the user has to sign in again. :raises Failure: no answer."""
        asked = {
            "grant_type": "refresh_token",
            "refresh_token": refresh_token,
            "client_id": self._sign_in.client_id,
        }
        return _decode(self._post(_safe(self._discover().get("token_endpoint")), asked), Granted)

    def _poll(self, url: str, code: DeviceCode) -> Granted:
        asked = {
            "grant_type": DEVICE_CODE,
            "device_code": code.device_code,
            "client_id": self._sign_in.client_id,
        }
        interval_s = min(max(code.interval, 1.0), _MAX_INTERVAL_S)
        end = time.monotonic() + min(code.expires_in, _LONGEST_S)
        while time.monotonic() + interval_s < end:
            time.sleep(interval_s)
            try:
                return _decode(self._post(url, asked), Granted)
            except Failure as failure:
                if failure.code != UNREACHABLE:
                    raise
                interval_s = min(2 * interval_s, _MAX_INTERVAL_S)
            except Refused as refused:
                if refused.code == "slow_down":
                    interval_s = min(interval_s + _SLOWER_S, _MAX_INTERVAL_S)
                elif refused.code == "access_denied":
                    raise Failure("the sign-in was denied") from None
                elif refused.code == "expired_token":
                    break
                elif refused.code != "authorization_pending":
                    raise Failure(f"the issuer refuses the sign-in: {refused}") from None
        raise Failure("no user signed in before the code expired", code=TIMED_OUT, hint="run `volar login` again")

    def _discover(self) -> dict[str, Any]:
        issuer = self._sign_in.issuer
        url = _safe(issuer).rstrip("/") + "/.well-known/openid-configuration"
        try:
            found = _decode(self._send("GET", url), dict[str, Any])
        except Refused as refused:
            raise Failure(f"{safe(url)}: {refused}") from None
        if found.get("issuer") != issuer:
            raise Failure(f"{safe(url)} belongs to another issuer, {safe(str(found.get('issuer'))[:200])}")
        return found

    def _post(self, url: str, form: dict[str, str]) -> bytes:
        return self._send("POST", url, form)

    def _send(self, method: str, url: str, form: dict[str, str] | None = None) -> bytes:
        """Returns the content of an answer. :raises Refused: it is an error. :raises Failure: there is no answer in
        time."""
        try:
            status, content = _within(_REQUEST_S, lambda: self._exchange(method, url, form))
        except TimeoutError:
            raise Failure(f"{safe(url)} does not answer within {_REQUEST_S:g} s", code=UNREACHABLE) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            text = str(error) or type(error).__name__
            raise Failure(f"{safe(url)} can't be reached: {safe(text)}", code=UNREACHABLE) from None
        if status == 200:
            return content
        try:
            said = msgspec.json.decode(content, type=dict[str, Any])
        except (ValueError, RecursionError):
            said = {}
        code = str(said.get("error", f"status {status}"))[:100]
        text = f"{code}: {str(said['error_description'])[:500]}" if "error_description" in said else code
        raise Refused(code, safe(text))

    def _exchange(self, method: str, url: str, form: dict[str, str] | None) -> tuple[int, bytes]:
        content = b""
        with self._http.stream(method, url, data=form, headers=_HEADERS) as answer:
            for piece in answer.iter_raw():
                content += piece
                if len(content) > _MAX_BYTES:
                    raise Failure(f"{safe(url)} answers with more than {_MAX_BYTES} bytes")
        return answer.status_code, content


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Returns the result of `work`, run in a thread: httpx has deadlines for each read, but none for all reads
    together.

    :raises TimeoutError: it takes longer; the thread continues and does not delay the program's end.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return done.result(seconds)


def _safe(url: object) -> str:
    if not isinstance(url, str) or not is_safe_url(url):
        raise Failure(f"{safe(str(url)[:200])} is not an https:// address of the issuer, so nothing is sent to it")
    return url


def _decode(content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (ValueError, RecursionError) as error:
        raise Failure(f"the issuer's answer is not valid: {error}") from None
