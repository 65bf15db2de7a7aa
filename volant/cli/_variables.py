"""Environment variables of commands and workloads: `-e KEY=VALUE`, `-e KEY`, and files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from volant.model import SecretRef

from ._run import Pair

_MAX_FILE = 1024 * 1024

env_option = click.option(
    "-e",
    "--env",
    "env",
    multiple=True,
    metavar="KEY[=VALUE]",
    help="An environment variable; without VALUE, volar's own value. May be repeated.",
)
env_file_option = click.option(
    "--env-file",
    "env_files",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file with one KEY=VALUE per line; may be repeated.",
)
env_secret_option = click.option(
    "--env-secret",
    "env_secrets",
    type=Pair(),
    multiple=True,
    metavar="KEY=SECRET",
    help="An environment variable with the value of a secret; may be repeated.",
)
secret_option = click.option(
    "--secret",
    "secrets",
    multiple=True,
    metavar="SECRET[:PATH]",
    help="A secret as a file, /run/secrets/SECRET without PATH; may be repeated.",
)


def variables(given: Iterable[str], files: Iterable[Path] = ()) -> dict[str, str]:
    """Returns the variables of `--env-file` and `-e`; the latter override the former.

    :raises click.UsageError: one has no name, or a file can't be read.
    """
    found: dict[str, str] = {}
    for file in files:
        for number, line in enumerate(_lines(file), 1):
            text = line.lstrip()
            if text and not text.startswith("#"):
                _set(found, text, f"{file}:{number}")
    for text in given:
        _set(found, text, "--env")
    return found


def _lines(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_FILE + 1)
    except OSError as error:
        raise click.UsageError(f"--env-file {str(file)!r} can't be read: {error.strerror}") from None
    if len(data) > _MAX_FILE:
        raise click.UsageError(f"--env-file {str(file)!r} has more than {_MAX_FILE} bytes")
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise click.UsageError(f"--env-file {str(file)!r} is no UTF-8") from None


def _set(found: dict[str, str], text: str, where: str) -> None:
    key, equals, value = text.partition("=")
    if not key or key != key.strip() or any(each.isspace() for each in key):
        raise click.UsageError(f"{where}: {text!r} is not KEY=VALUE")
    if equals:
        found[key] = value
    elif (own := os.environ.get(key)) is not None:
        # A variable that volar does not have is left out, as Docker does.
        found[key] = own


def with_secrets(plain: Mapping[str, str], secrets: Iterable[tuple[str, str]]) -> dict[str, str | SecretRef]:
    """Returns the variables, including those of `--env-secret`.

    :raises click.UsageError: one also has a plain value.
    """
    found: dict[str, str | SecretRef] = dict(plain)
    for variable, secret in secrets:
        if variable in found:
            raise click.UsageError(f"the variable {variable!r} is given twice, with --env-secret at least once")
        found[variable] = SecretRef(secret)
    return found
