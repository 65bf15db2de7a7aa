"""Finds the credentials for one repository in an auth file."""

from __future__ import annotations

import re

import msgspec

from ._auth import AuthFile
from ._errors import OciError
from ._reference import DEFAULT_REGISTRY


class Credentials(msgspec.Struct, frozen=True):
    """The credentials of an auth file for one repository. Never shown or logged."""

    basic: str = ""
    """The base64 of user and password; empty if there are none."""
    identity_token: str = ""
    """A token of a token service, in place of a password."""


def find_credentials(auth: bytes, name: str) -> Credentials:
    """Returns the credentials in an auth file for `registry/repository`: the entry with the longest name, as in
    containers-auth.json(5). :raises OciError: `bad_credentials`"""
    try:
        entries = msgspec.json.decode(auth, type=AuthFile).auths
    except (ValueError, RecursionError):
        raise OciError(
            "bad_credentials", "the credentials for registries can't be read",
            "send an auth file, such as ~/.docker/config.json, as `docker login` writes it",
        ) from None  # fmt: skip
    # Docker writes URLs.
    known = {re.sub(r"^https?://|/v[12]/?\Z|/\Z", "", key): entry for key, entry in entries.items()}
    parts = name.split("/")
    names = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    if parts[0] == DEFAULT_REGISTRY:
        names.append(f"index.{DEFAULT_REGISTRY}")
    for each in names:
        if (entry := known.get(each)) is not None:
            return Credentials(entry.auth, entry.identitytoken)
    return Credentials()
