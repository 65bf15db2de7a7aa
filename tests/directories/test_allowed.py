"""Which directories of the host VMs may have."""

from __future__ import annotations

from pathlib import Path

import pytest

from volant.directories import AllowedDirectory, check_allowed, parse_allowed
from volant.model import DirectoryMount, Problem

ALLOWED = tuple(map(parse_allowed, ("/srv:rw", "/srv/secret", "/home/me/project:ro", "/home/me/project/out:rw")))


def mount(source: str, *, read_only: bool = True) -> DirectoryMount:
    return DirectoryMount(source=source, path="/data", read_only=read_only)


@pytest.mark.parametrize(
    "text", ["", "srv", "/", "/srv/", "/srv/../etc", "/srv/./x", "/srv:", "/srv:wr", "/srv:rw:rw", "/a//b"]
)
def test_a_malformed_directory_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not /path or /path:rw"):
        parse_allowed(text)


@pytest.mark.parametrize(
    ("source", "read_only", "found"),
    [
        ("/srv", False, "/srv"),
        ("/srv/data/in", False, "/srv"),
        ("/srv/secret/x", True, "/srv/secret"),
        ("/home/me/project/src", True, "/home/me/project"),
        ("/home/me/project/out", False, "/home/me/project/out"),
    ],
)
def test_the_innermost_allowed_directory_counts(source: str, read_only: bool, found: str) -> None:
    assert check_allowed(mount(source, read_only=read_only), ALLOWED).path == Path(found)


@pytest.mark.parametrize(
    ("source", "read_only"),
    [
        ("/etc", True),
        ("/srv2", True),
        ("/home/me", True),
        ("/srv/secret", False),
        ("/home/me/project", False),
        ("/srv/volant", True),
        ("/srv/volant/disks", True),
        ("/srv", True),
    ],
)
def test_others_and_the_daemon_s_own_are_denied(source: str, read_only: bool) -> None:
    with pytest.raises(Problem) as problem:
        check_allowed(mount(source, read_only=read_only), ALLOWED, [Path("/srv/volant")])
    assert (problem.value.status, problem.value.code) == (403, "host-directory-denied")
    assert source in problem.value.detail


def test_nothing_is_allowed_without_the_setting() -> None:
    with pytest.raises(Problem, match="none is allowed"):
        check_allowed(mount("/srv"), ())
    assert str(AllowedDirectory(Path("/srv"), True)) == "/srv:rw"
