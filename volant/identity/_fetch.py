"""Fetches documents of issuers over HTTPS, with a deadline and a limit of size."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

import trio

from ._code_flow import Reply
from ._issuer import FETCH_S, MAX_BYTES, Document, IssuerError

_HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity"}
"""Headers without compression: a small answer could otherwise expand to a large one."""


async def fetch_document(url: str) -> Document:
    """Returns the document at a URL. Follows no redirect.

    :raises IssuerError: there is no answer in time, its status is not 200, or it is too long.
    """
    reply, cache_control = await _exchange("GET", url)
    if reply.status != 200:
        raise IssuerError(f"{url} answers with status {reply.status}")
    return Document(reply.content, cache_control)


async def post_form(url: str, form: Mapping[str, str], login: tuple[str, str] | None) -> Reply:
    """Posts a form, with or without a user and a password. Follows no redirect, which could lead the form elsewhere.

    :raises IssuerError: there is no answer in time, or it is too long.
    """
    reply, _ = await _exchange("POST", url, form, login)
    return reply


async def _exchange(
    method: str, url: str, form: Mapping[str, str] | None = None, login: tuple[str, str] | None = None
) -> tuple[Reply, str]:
    """Returns an answer and its `Cache-Control`. :raises IssuerError: there is none in time, or it is too long."""
    import httpx

    content = b""
    try:
        # A body that is too long is cancelled: an unfinished generator of httpx would not be closed.
        with trio.fail_after(FETCH_S), trio.CancelScope() as reading:
            async with (
                httpx.AsyncClient(timeout=FETCH_S, follow_redirects=False, auth=login) as client,
                client.stream(method, url, data=form, headers=_HEADERS) as answer,
            ):
                async for piece in answer.aiter_raw():
                    content += piece
                    if len(content) > MAX_BYTES:
                        reading.cancel()
                reply = Reply(answer.status_code, content), answer.headers.get("cache-control", "")
        if len(content) > MAX_BYTES:
            raise IssuerError(f"{url} answers with more than {MAX_BYTES} bytes")
        return reply
    except trio.TooSlowError:
        raise IssuerError(f"{url} does not answer within {FETCH_S:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError, ValueError) as error:
        raise IssuerError(f"{url}: {str(error) or type(error).__name__}") from None
