"""The addresses of the browser in a VM, for DevTools clients."""

from __future__ import annotations

from typing import Any

import msgspec

from ._errors import ClientError
from ._transport import Request, Transport, decode

_WAIT_S = 90.0
"""Longer than the daemon waits for the VM and its browser."""


class BrowserPage(msgspec.Struct, frozen=True):
    """A page, or another target that DevTools clients may attach to."""

    id: str
    type: str = ""
    title: str = ""
    url: str = ""


class Browser(msgspec.Struct, frozen=True):
    """The browser in a VM, for clients of the Chrome DevTools Protocol. If the daemon requires a key, these addresses
    require it too."""

    name: str
    """Product and version, as reported by the browser."""
    endpoint: str
    """The endpoint for Playwright, @playwright/mcp and others that request `/json/version`."""
    websocket: str
    """The endpoint for Puppeteer's `browserWSEndpoint` and others that connect directly."""
    pages: list[BrowserPage]


class _Version(msgspec.Struct, frozen=True):
    browser: str = msgspec.field(name="Browser", default="")


async def find_browser(http: Transport, path: str) -> Browser:
    """Returns the browser at `path`, which ends with `/devtools`."""
    version = decode(await http.send(Request("GET", f"{path}/json/version"), timeout_s=_WAIT_S), _Version)
    pages = await http.get(f"{path}/json/list", list[BrowserPage])
    endpoint = f"{await _base(http)}{path}"
    return Browser(version.browser, endpoint, f"ws{endpoint.removeprefix('http')}/browser", pages)


async def _base(http: Transport) -> str:
    """Returns the daemon's address for programs that can't use Unix sockets."""
    if http.address.socket_path is None:
        return http.address.http_url
    info: dict[str, Any] = await http.get("/api/v1/system/info", dict[str, Any])
    for address in info.get("addresses", ()):
        if str(address).startswith("http"):
            return str(address)
    raise ClientError(
        "the daemon listens only on a Unix socket, which DevTools clients can't connect to",
        hint="let it listen on 127.0.0.1:7777 too",
    )
