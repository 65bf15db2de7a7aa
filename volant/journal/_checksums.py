"""Checksums of pages: SQLite's own extension for them (`cksumvfs`), which comes with apsw.

SQLite notices a damaged structure, but not a changed byte of the content. With a checksum of eight bytes at the end of
each page, reading a changed page is an error. The extension is a layer beneath all databases of the process. It leaves
databases without checksums alone. A new database has them from the start, as adding them later rewrites the whole file.
"""

from __future__ import annotations

from contextlib import closing

import apsw
import apsw.sqlite_extra

RESERVED_BYTES = 8
"""At the end of each page. The extension recognises its databases by this number."""


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
"""Whether apsw was built with the extension."""


def has_checksums(connection: apsw.Connection) -> bool:
    """Returns whether the pages of a database have checksums."""
    return connection.reserve_bytes() == RESERVED_BYTES


def is_changed_page(error: BaseException) -> bool:
    """Returns whether the error is a wrong checksum."""
    return isinstance(error, apsw.IOError) and getattr(error, "extendedresult", None) == apsw.SQLITE_IOERR_DATA
