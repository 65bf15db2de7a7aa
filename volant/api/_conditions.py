"""Conditional requests: `If-Match` and `If-None-Match` (RFC 9110, 13)."""

from __future__ import annotations

import re
from collections.abc import Collection

from quart import request

from volant.http import has_etag
from volant.model import invalid
from volant.vm import Version

_ETAG = re.compile(r'"(\d{1,18})-(\d{1,18})"\Z', re.ASCII)


def if_match() -> Collection[Version] | None:
    """Returns the versions of a VM in `If-Match`, one of which must be the present one; None: any version.

    An `ETag` that is not ours, weak ones too (RFC 9110, 13.1.1), matches no version.

    :raises Problem: 400 the header is empty
    """
    given = request.headers.getlist("If-Match")
    if not given:
        return None
    tags = [tag.strip() for line in given for tag in line.split(",")]
    if not any(tags):
        raise invalid(
            "If-Match", "the header If-Match is empty", hint="send the ETag of the VM, or leave the header out"
        )
    if "*" in tags:
        return None
    return [Version(int(found[1]), int(found[2])) for tag in tags if (found := _ETAG.match(tag))]


def if_none_match(etag: str) -> bool:
    """Returns whether the client already has this version."""
    return has_etag(request.headers.getlist("If-None-Match"), etag)
