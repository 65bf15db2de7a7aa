"""The files of the console and of `/docs`, ready for sending: read once, compressed, below a path with their digest.

All files share one digest. So modules import each other by relative paths, a browser caches them permanently, and an
upgrade is atomic.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

_FILES = Path(__file__).with_name("static")
_PAGE = "index.html"
PAGES = {"/": b"app", "/docs": b"docs"}
"""The first module of each page. The rest of the pages is the same."""
_TYPES = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
"""The types of served files. Other files in the folder, such as licences, are not served."""
_INLINE = re.compile(rb'<script type="importmap">(.*?)</script>', re.DOTALL)


class File(msgspec.Struct, frozen=True):
    """A file, and its HTTP headers."""

    media: bytes
    body: bytes
    compressed: bytes
    """The body with gzip."""
    etag: bytes


class Site(msgspec.Struct, frozen=True):
    """The console of one version of the program."""

    digest: str
    """A part of the path of each file."""
    pages: Mapping[str, File]
    """The pages by path."""
    files: Mapping[str, File]
    """The files by path."""
    inline: bytes
    """The digest of the import map in the pages, for their policy."""

    def policy(self, origin: str) -> bytes:
        """Returns the policy of the pages at an origin, given as `host[:port]`.

        Only scripts and styles of the console are allowed. `'self'` would be wrong: pages and scripts of guests have
        paths of the same origin.
        """
        # A policy can't name an IPv6 address (CSP 3, 2.3.1).
        ours = "'self'" if "[" in origin else f"{origin}/console/{self.digest}/"
        return (
            f"default-src 'none'; script-src {ours} 'sha256-{self.inline.decode()}'; style-src {ours}; "
            f"img-src {ours} data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
        ).encode()


def load_site() -> Site:
    """Reads and compresses all files; takes some 30 ms."""
    bodies = {
        str(path.relative_to(_FILES)): path.read_bytes() for path in sorted(_FILES.rglob("*")) if _is_served(path)
    }
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + body for name, body in bodies.items())).hexdigest()[:16]
    page = bodies.pop(_PAGE).replace(b"{digest}", digest.encode())
    inline = _INLINE.search(page)
    assert inline is not None
    return Site(
        digest=digest,
        pages={path: _file(_PAGE, page.replace(b"{module}", module)) for path, module in PAGES.items()},
        files={name: _file(name, body) for name, body in bodies.items()},
        inline=base64.b64encode(hashlib.sha256(inline[1]).digest()),
    )


def _is_served(path: Path) -> bool:
    return path.is_file() and path.suffix in _TYPES


def _file(name: str, body: bytes) -> File:
    return File(
        media=_TYPES[Path(name).suffix],
        body=body,
        # Without the time, so that it is the same each time.
        compressed=gzip.compress(body, mtime=0),
        etag=b'"%b"' % hashlib.sha256(body).hexdigest()[:32].encode(),
    )
