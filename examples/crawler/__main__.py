"""Crawls a site: `python -m examples.crawler URL [REQUESTS_PER_SECOND]`. It stays on the host of the first URL."""

from __future__ import annotations

import logging
import re
import sys
from urllib.parse import urldefrag, urljoin, urlsplit

import httpx
import trio

from actors import open_system

from .crawler import Finished, build

BYTES_MAX = 2_000_000
_LINK = re.compile(rb"""<a\s[^>]*?href=["']([^"'<>\s]+)""", re.IGNORECASE)


async def main(begin: str, per_s: float) -> int:
    host = urlsplit(begin).netloc

    async def fetch(url: str) -> tuple[str, ...]:
        body = b""
        try:
            async with client.stream("GET", url) as response:
                response.raise_for_status()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > BYTES_MAX:
                        break
        except httpx.HTTPError as exc:
            raise OSError(str(exc)) from exc
        links = (urldefrag(urljoin(url, link.decode(errors="replace"))).url for link in _LINK.findall(body))
        return tuple(link for link in links if urlsplit(link).netloc == host)

    async with httpx.AsyncClient(follow_redirects=True, timeout=10) as client:
        tree, frontier = build(fetch, begin, per_s=per_s)
        async with open_system(tree, name="crawl") as system:
            summary = await frontier.ask(Finished(), timeout_s=3600)
            print(system.format_tree())
    print(f"{len(summary.fetched)} pages fetched, {len(summary.failed)} failed")
    return 1 if summary.failed else 0


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    sys.exit(trio.run(main, sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 5.0))
