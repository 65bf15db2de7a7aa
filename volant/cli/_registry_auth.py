"""Credentials for the registry of one image, from the files and helpers that Docker and Podman use.

The daemon receives only the credentials for this registry. The order is Docker's: a credential helper for the registry,
then the store of all credentials, then the file's own entries.
"""

from __future__ import annotations

import os
import re
import subprocess
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import msgspec

from ._run import Failure
from ._text import safe

_MAX_FILE = 1024 * 1024
_MAX_ANSWER = 64 * 1024
_HELPER_S = 30.0
"""A helper may ask the user to unlock a key ring, which takes time."""
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_NO_USER = "<token>"
"""The user name of a helper that returns a token."""
_NOT_FOUND = "credentials not found"


class _Entry(msgspec.Struct, omit_defaults=True):
    """The credentials of one registry, in an auth file."""

    auth: str = ""
    identitytoken: str = ""
    username: str = ""
    password: str = ""


class _AuthFile(msgspec.Struct, rename={"helpers": "credHelpers", "store": "credsStore"}):
    auths: dict[str, _Entry] = {}
    helpers: dict[str, str] = {}
    store: str = ""


class _Answer(msgspec.Struct, rename="pascal"):
    """The output of a helper."""

    username: str = ""
    secret: str = ""


def registry_auth(reference: str, authfile: Path | None, registry_secret: str | None = None) -> str | None:
    """Returns an auth file, in base64, with the credentials for an image's registry; None if there are none to send.

    :param authfile: the user's choice; None for the default of `--authfile`
    :param registry_secret: the secret with the credentials
    :raises click.UsageError: both are given, or the file can't be read.
    :raises Failure: a file is malformed, or a helper failed.
    """
    from volant.oci import DEFAULT_REGISTRY, OciError, parse_reference

    if registry_secret is not None:
        if authfile is not None:
            raise click.UsageError("--authfile and --registry-secret exclude each other")
        return None
    try:
        found = parse_reference(reference)
    except OciError:
        # The daemon says what is wrong with it.
        return None
    if not found.registry:
        return None
    path, named = _path(authfile, os.environ)
    read = _read(path, named)
    if read is None:
        return None
    server = f"https://index.{DEFAULT_REGISTRY}/v1/" if found.registry == DEFAULT_REGISTRY else found.registry
    places = tuple(_places(found.name))
    entry = _of_helpers(read, found.registry, server) or _of_file(read, places)
    if entry is None:
        return None
    return b64encode(msgspec.json.encode({"auths": {found.registry: entry}})).decode()


def _path(authfile: Path | None, environ: Mapping[str, str]) -> tuple[Path, bool]:
    """Returns the auth file, and whether the user has named it, so that it must exist."""
    if authfile is not None:
        return authfile, True
    if given := environ.get("REGISTRY_AUTH_FILE"):
        return Path(given), True
    directory = environ.get("DOCKER_CONFIG")
    return (
        Path(directory) if directory else Path(environ.get("HOME", "/nonexistent")) / ".docker"
    ) / "config.json", False


def _read(path: Path, named: bool) -> _AuthFile | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE)
    except OSError as error:
        if named:
            raise click.UsageError(f"the auth file {str(path)!r} can't be read: {error.strerror}") from None
        return None
    try:
        return msgspec.json.decode(data, type=_AuthFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Not the error's own text, which may quote the file.
        raise Failure(
            f"{path} is no auth file: {type(error).__name__}", hint="it has to be as Docker writes it"
        ) from None


def _places(name: str) -> Iterator[str]:
    """Yields the keys of an auth file that apply to a repository: the most specific first, its registry last."""
    while name:
        yield name
        name = name.rpartition("/")[0]


def _of_file(read: _AuthFile, places: tuple[str, ...]) -> _Entry | None:
    entries = {_normal(key): entry for key, entry in read.auths.items()}
    for place in places:
        entry = entries.get(_normal(place))
        if entry is not None and (entry.auth or entry.identitytoken or entry.username):
            return entry
    return None


def _normal(key: str) -> str:
    """Returns a key without the URL around it: Docker writes `https://HOST/v1/` for its own registry."""
    from volant.oci import DEFAULT_REGISTRY

    text = re.sub(r"\Ahttps?://", "", key)
    text = re.sub(r"/v[12]/?\Z", "", text).rstrip("/")
    return DEFAULT_REGISTRY if text == f"index.{DEFAULT_REGISTRY}" else text


def _of_helpers(read: _AuthFile, registry: str, server: str) -> _Entry | None:
    for key, helper in read.helpers.items():
        if _normal(key) == _normal(registry):
            return _ask(helper, server)
    return _ask(read.store, server) if read.store else None


def _ask(helper: str, server: str) -> _Entry | None:
    """Runs a credential helper. :raises Failure: it failed."""
    if not _HELPER.match(helper):
        raise Failure(f"{safe(helper[:80])!r} is no name of a credential helper")
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=server.encode(), capture_output=True, timeout=_HELPER_S, check=False
        )
    except FileNotFoundError:
        raise Failure(f"the credential helper {program} is not installed", hint="the auth file names it") from None
    except OSError as error:
        raise Failure(f"the credential helper {program} can't be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"the credential helper {program} did not answer within {_HELPER_S:g} s") from None
    if done.returncode != 0:
        # It prints the reason to standard output, and never a secret then.
        said = (done.stdout + done.stderr)[:1000].decode(errors="replace").strip()
        if _NOT_FOUND in said:
            return None
        raise Failure(f"the credential helper {program} failed with {done.returncode}: {safe(said)}")
    try:
        answer = msgspec.json.decode(done.stdout[:_MAX_ANSWER], type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Failure(f"the credential helper {program} printed something else than credentials") from None
    if answer.username == _NO_USER:
        return _Entry(identitytoken=answer.secret)
    return _Entry(auth=b64encode(f"{answer.username}:{answer.secret}".encode()).decode())
