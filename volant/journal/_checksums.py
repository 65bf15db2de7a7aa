"""Checksums of pages: SQLite's own extension for them (`cksumvfs`), which comes with apsw.

SQLite finds out when the structure of a file is damaged, but not that a byte of what is kept in it has changed. With
eight bytes at the end of each page that are a checksum of it, a page that is read and is not what was written is an
error. The extension is a layer beneath all databases of the process. Those whose pages have no such bytes are what they
were; a new one has them from the start, as a page can't be given them later without writing the whole file anew.
"""

from __future__ import annotations

from contextlib import closing

import apsw
import apsw.sqlite_extra

RESERVED_BYTES = 8
"""At the end of each page: what the extension knows its databases by."""


def _install() -> bool:
    if "cksmvfs" in apsw.vfs_names():
        return True
    try:
        with closing(apsw.Connection(":memory:")) as connection:
            apsw.sqlite_extra.load(connection, "cksumvfs")
    except (apsw.sqlite_extra.NotAvailable, apsw.Error, LookupError):
        return False
    return True


AVAILABLE = _install()
"""Whether pages can have them. apsw may have been built without the extension."""


def has_checksums(connection: apsw.Connection) -> bool:
    """Whether the pages of a database have them."""
    return connection.reserve_bytes() == RESERVED_BYTES


def is_changed_page(error: BaseException) -> bool:
    """Whether a page that was read is not what was written."""
    return isinstance(error, apsw.IOError) and getattr(error, "extendedresult", None) == apsw.SQLITE_IOERR_DATA
