"""References: the names of images, with Docker's defaults.

The grammar of names in registries is that of the distribution project (`reference/reference.go`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from volant.model import DEFAULT_PROJECT

from ._errors import OciError

Transport = Literal["docker", "oci", "oci-archive", "docker-archive"]
"""The source of an image, in skopeo's terms: a registry, a directory or a file."""

DEFAULT_REGISTRY = ".".join(("docker", "io"))
"""The default registry, in pieces, as this repository names no host of a registry."""
_OTHER_NAME = f"index.{DEFAULT_REGISTRY}"
_FILES: dict[str, Transport] = {"oci": "oci", "oci-archive": "oci-archive", "docker-archive": "docker-archive"}
_OFFICIAL = "library"
_LATEST = "latest"
_MAX_TEXT = 4096
_MAX_NAME = 255
_SHOWN = 120

_HOST_PART = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_REGISTRY = re.compile(rf"(?:{_HOST_PART}(?:\.{_HOST_PART})*|\[[0-9a-fA-F:]{{2,45}}\])(?::[0-9]{{1,5}})?\Z")
_PATH_PART = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_PLAIN = re.compile(r"[^\x00-\x1f\x7f]+\Z")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference to an image. `str` returns its complete form, which `parse_reference` can parse, except for the
    project."""

    transport: Transport
    name: str
    """The complete `registry/repository`, or an absolute path."""
    tag: str = ""
    """Empty if the reference has a digest, or means the file's only image. In archives of Docker it is `name:tag`."""
    digest: str = ""
    """The `sha256:…` of a manifest in a registry; empty if the tag decides."""
    project: str = DEFAULT_PROJECT
    """The project that the name belongs to; each project has its own names."""

    def __str__(self) -> str:
        prefix = "" if self.transport == "docker" else f"{self.transport}:"
        return f"{prefix}{self.name}{self.tag and f':{self.tag}'}{self.digest and f'@{self.digest}'}"

    @property
    def registry(self) -> str:
        """The registry with its port; empty for files."""
        return self.name.partition("/")[0] if self.transport == "docker" else ""

    def with_digest(self, digest: str) -> Reference:
        """Returns the reference of one manifest in the same repository of a registry."""
        return replace(self, tag="", digest=digest)


def parse_reference(text: str, project: str = DEFAULT_PROJECT) -> Reference:
    """Parses a reference in a user's notation: `python`, `registry:5000/team/app:1.2`, `app@sha256:…`, `oci:/path:tag`,
    `oci-archive:/path`, `docker-archive:/path:name:tag`.

    :param project: the project that the name belongs to

    A tag beside a digest is checked and dropped, as Docker does: the digest decides.

    :raises OciError: `bad_reference`
    """
    if not text or len(text) > _MAX_TEXT or not _PLAIN.match(text):
        raise _bad(text, f"a reference has 1 to {_MAX_TEXT} characters, and no control characters")
    transport, colon, rest = text.partition(":")
    if colon and transport in _FILES and rest[:1] in ("/", ".", ""):
        return replace(_in_file(text, _FILES[transport], rest), project=project)
    if _URL.match(text):
        raise _bad(text, "it begins like a URL", "write registry/name:tag, without https:// or docker://")
    return replace(_in_registry(text), project=project)


def _in_file(text: str, transport: Transport, rest: str) -> Reference:
    path, _, tag = rest.partition(":")
    if not path.startswith("/"):
        raise _bad(text, "its path is not absolute", f"write {transport}:/path")
    if transport == "docker-archive":
        if tag:
            # Archives contain complete names: `docker save python` writes library/python at Docker's registry.
            tag = str(_in_registry(tag))
            if "@" in tag:
                raise _bad(text, "archives of Docker have no digests", "write docker-archive:/path:name:tag")
    elif tag and not _TAG.match(tag):
        raise _bad(text, f"{_cut(tag)!r} is not a tag", f"write {transport}:/path:tag, with a path without ':'")
    return Reference(transport, path, tag)


def _in_registry(text: str) -> Reference:
    named, at, digest = text.partition("@")
    if at and not _DIGEST.match(digest):
        raise _bad(text, f"{_cut(digest)!r} is not a digest", "write sha256: and 64 lower-case hexadecimal digits")
    first, slash, path = named.partition("/")
    # As Docker does: without one of these signs the first part is a folder of the default registry.
    if slash and (any(sign in first for sign in ".:[") or first == "localhost" or first.lower() != first):
        registry = first
    else:
        registry, path = DEFAULT_REGISTRY, named
    if not _REGISTRY.match(registry):
        raise _bad(text, f"{_cut(registry)!r} is not a registry", "write a host name or address, and a port if needed")
    repository, colon, tag = path.partition(":")
    if registry == _OTHER_NAME:
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and repository and "/" not in repository:
        repository = f"{_OFFICIAL}/{repository}"
    for part in repository.split("/"):
        if not _PATH_PART.match(part):
            hint = "names are in lower case" if part.lower() != part else "write registry/name:tag or name@sha256:…"
            raise _bad(text, f"{_cut(part)!r} is not part of a name", hint)
    if colon and not _TAG.match(tag):
        raise _bad(text, f"{_cut(tag)!r} is not a tag", "a tag has up to 128 letters, digits and ._-")
    name = f"{registry}/{repository}"
    if len(name) > _MAX_NAME:
        raise _bad(text, f"its name has {len(name)} characters, at most {_MAX_NAME} are allowed")
    if digest:
        return Reference("docker", name, digest=digest)
    return Reference("docker", name, tag or _LATEST)


def _bad(text: str, why: str, hint: str = "") -> OciError:
    return OciError("bad_reference", f"{_cut(text)!r} is not the reference of an image: {why}", hint)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
