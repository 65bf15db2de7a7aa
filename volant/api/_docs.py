"""`/openapi.json` and `/docs`: the documentation of the API, for machines and for people."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import msgspec
from quart import Response
from quart_trio import QuartTrio

from volant.operations import ApiDeps, Table

from ._json import no_query
from ._openapi import document

_PAGE = Path(__file__).with_name("docs.html")


def add_routes(app: QuartTrio, deps: ApiDeps, table: Table) -> None:
    """The routes of this resource."""
    page = _PAGE.read_text()
    policy = _policy(page)

    @app.get("/openapi.json")
    async def openapi() -> Response:
        no_query()
        # Built at the first request, in a thread, as it reads source files.
        plain = await deps.host.threads.run(document, table)
        return Response(msgspec.json.encode(plain), content_type="application/json")

    @app.get("/docs")
    async def docs() -> Response:
        no_query()
        response = Response(page, content_type="text/html; charset=utf-8")
        response.headers["Content-Security-Policy"] = policy
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def _policy(page: str) -> str:
    """Returns the policy under which only the page's own script and style run."""
    sources = {tag: _hash(re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)) for tag in ("script", "style")}
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(texts: list[str]) -> str:
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
