"""Clients' credentials for registries: the content of an auth file, of which only a part may be used.

An auth file can name programs that are run to get credentials (`credHelpers`, `credsStore`). So only credentials in the
file itself are used.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import msgspec

from ._errors import OciError

_MAX_BYTES = 64 * 1024
_MAX_REGISTRIES = 256
_UNREADABLE = "the credentials for registries can't be read"
_HINT = "send the base64 of a file as `skopeo login --authfile` writes it"

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512, pattern=r"^[!-~]+\Z")]
_Word = Annotated[str, msgspec.Meta(max_length=16384, pattern=r"^[!-~]*\Z")]


class _Entry(msgspec.Struct, omit_defaults=True):
    auth: _Word = ""
    identitytoken: _Word = ""


class AuthFile(msgspec.Struct):
    """The relevant content of an auth file."""

    auths: Annotated[dict[_Name, _Entry], msgspec.Meta(max_length=_MAX_REGISTRIES)] = msgspec.field(
        default_factory=dict
    )


def read_auth(text: str) -> bytes:
    """Returns the content of an auth file whose base64 a client has sent. :raises OciError: `bad_credentials`; the
    error contains no text of it."""
    if len(text) > _MAX_BYTES:
        raise OciError("bad_credentials", f"the credentials for registries have more than {_MAX_BYTES} bytes", _HINT)
    try:
        # Also without padding, and in the form for URLs.
        plain = text.strip().rstrip("=").replace("-", "+").replace("_", "/")
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise OciError("bad_credentials", _UNREADABLE, _HINT) from None
    return read_auth_file(data)


def read_auth_file(data: bytes, *, secret: str | None = None) -> bytes:
    """Returns the credentials of an auth file, as an auth file.

    :param secret: the name of the secret with the file
    :raises OciError: `bad_credentials`, without a text of the file
    """
    try:
        found = msgspec.json.decode(data, type=AuthFile)
    except (ValueError, RecursionError):
        hint = f"`skopeo login --authfile FILE` writes an auth file, and `volar secrets set {secret} < FILE` stores it"
        raise OciError("bad_credentials", _UNREADABLE, _HINT if secret is None else hint) from None
    return msgspec.json.encode(found)
