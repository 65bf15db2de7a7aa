"""What requests to VMs and plugins share: names in paths, parameters, preconditions."""

from __future__ import annotations

import re
from collections.abc import Collection

from quart import request

from volant.http import Query
from volant.model import WAIT_STATES, VmRow, invalid, is_name
from volant.operations import no_such_plugin
from volant.vm import Version

MAX_WAIT_S = 600.0
DEFAULT_WAIT_S = 60.0
_ETAG = re.compile(r'"(\d{1,18})-(\d{1,18})"\Z', re.ASCII)


def query() -> Query:
    """The parameters of the request under way."""
    return Query(request.query_string)


def no_query() -> None:
    """:raises Problem: 400 when there is any parameter."""
    if request.query_string:
        query().done()


def wait_of(parameters: Query) -> tuple[Collection[str], float]:
    """States to wait for, none if there is nothing to wait for, and how long. :raises Problem: 400."""
    states = parameters.words("wait", frozenset(WAIT_STATES))
    timeout_s = parameters.duration("timeout", DEFAULT_WAIT_S, maximum_s=MAX_WAIT_S)
    return states, timeout_s


def etag(vm_id: int, revision: int) -> str:
    """Changes with every change of the VM."""
    return f'"{vm_id}-{revision}"'


def if_match() -> Collection[Version] | None:
    """The states of a VM of which the request wants one to be the present one; None when any will do.

    What is no `ETag` of ours, weak ones too (RFC 9110, 13.1.1), is no state of any VM.

    :raises Problem: 400 when it is empty: whoever meant to have an `ETag` has none.
    """
    tags = _tags("If-Match")
    if tags is None:
        return None
    if not any(tags):
        raise invalid(
            "If-Match", "the header If-Match is empty", hint="send the ETag of the VM, or leave the header out"
        )
    if "*" in tags:
        return None
    return [Version(int(found[1]), int(found[2])) for tag in tags if (found := _ETAG.match(tag))]


def is_not_modified(row: VmRow) -> bool:
    """Whether the client has what it would get."""
    return any(tag.removeprefix("W/") in ("*", etag(row.id, row.revision)) for tag in _tags("If-None-Match") or ())


def _tags(header: str) -> list[str] | None:
    """What a header lists, in one line or several; None when it is not there."""
    given = request.headers.getlist(header)
    return [tag.strip() for line in given for tag in line.split(",")] if given else None


def plugin_name(name: str) -> str:
    """:raises Problem: 404 when there can't be a plugin of this name."""
    if not is_name(name):
        raise no_such_plugin(name)
    return name
