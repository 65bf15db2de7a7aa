"""Finds the file with the daemon's settings, and edits the part that `volar` has written; the rest is kept.

It is the TOML file of `volantd --config` or `VOLANT_CONFIG`, or the service's file with `VOLANT_*` variables,
`/etc/default/volantd`.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import _setup
from ._run import Failure

_BEGIN = "# Written by `volar fleet join`. Don't edit this part: `volar fleet leave` removes it."
_END = "# The end of what `volar fleet join` has written."
_PLAIN = re.compile(r"[A-Za-z0-9/._+@:,=\[\]-]+")


class SettingsFile:
    """A file with settings.

    :param toml: whether it is in TOML; otherwise it has variables
    :param service: whether the daemon is a systemd service
    """

    def __init__(self, path: Path, *, toml: bool, service: bool) -> None:
        # For a link, its target is replaced, and the link is kept.
        self.path = path.resolve()
        self.toml = toml
        self.service = service
        try:
            self.text = self.path.read_text()
        except FileNotFoundError:
            self.text = ""
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None

    def others(self, prefix: str) -> list[str]:
        """Returns the names of settings with a prefix that `volar` has not written."""
        return sorted(name for name in self._values(self._with({})) if name.startswith(prefix))

    def candidate(self, settings: Mapping[str, str]) -> str:
        """Returns the text of the file with these settings in volar's part. Without settings, the part is removed.

        :raises Failure: the file can't contain them
        """
        text = self._with(settings)
        if self._values(text) != {**self._values(self._with({})), **settings}:
            raise Failure(
                f"the settings can't be added to {self.path}, as something before them is not closed",
                hint="add them by hand: " + ", ".join(f"{name}={value}" for name, value in settings.items()),
            )
        return text

    def write(self, text: str) -> bool:
        """Replaces the whole file; returns whether its text changed. Mode and owner stay. :raises Failure: it can't be
        written."""
        if text == self.text:
            return False
        fresh = self.path.with_name(f".{self.path.name}.new")
        try:
            fresh.unlink(missing_ok=True)
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                self._keep_owner(file.fileno())
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)
        except OSError as error:
            raise Failure(f"{self.path} can't be written: {error.strerror}") from None
        self.text = text
        return True

    def environ(self, text: str) -> dict[str, str]:
        """Returns the variables that the file's text sets for the daemon; none if it is in TOML."""
        return {} if self.toml else {f"VOLANT_{name.upper()}": value for name, value in self._values(text).items()}

    def _keep_owner(self, descriptor: int) -> None:
        try:
            before = self.path.stat()
        except FileNotFoundError:
            os.fchmod(descriptor, 0o644)
            return
        os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
        os.fchown(descriptor, before.st_uid, before.st_gid)

    def _with(self, settings: Mapping[str, str]) -> str:
        # A value may have what Python takes for the end of a line, as U+2028, and TOML and systemd do not.
        lines = self.text.removesuffix("\n").split("\n") if self.text else []
        if _BEGIN in lines and _END in lines[lines.index(_BEGIN) :]:
            begin = lines.index(_BEGIN)
            end = lines.index(_END, begin)
            before, after = lines[:begin], lines[end + 1 :]
        else:
            before, after = lines, []
        part = [_BEGIN, *(self._line(name, value) for name, value in settings.items()), _END] if settings else []
        text = "\n".join([*before, *part, *after])
        return f"{text}\n" if text else ""

    def _line(self, name: str, value: str) -> str:
        if not value.isprintable():
            raise Failure(f"{name} {value!r} has characters that no setting can have")
        if self.toml:
            return f"{name} = {json.dumps(value, ensure_ascii=False)}"
        if not _PLAIN.fullmatch(value):
            value = '"' + re.sub(r'([\\"$`])', r"\\\1", value) + '"'
        return f"VOLANT_{name.upper()}={value}"

    def _values(self, text: str) -> dict[str, Any]:
        if self.toml:
            try:
                return tomllib.loads(text)
            except tomllib.TOMLDecodeError as error:
                raise Failure(f"{self.path} is not TOML: {error}") from None
        return {
            name.removeprefix("VOLANT_").lower(): value
            for name, value in _setup.variables(text).items()
            if name.startswith("VOLANT_")
        }


def find(config: str | None) -> SettingsFile:
    """Returns the file with the settings of this host's daemon.

    :param config: the user's choice
    :raises Failure: it can't be determined
    """
    variables = _setup.settings()
    service = (_setup.DIRECTORY / "volantd.service").exists()
    named = config or os.environ.get("VOLANT_CONFIG")
    if named:
        return SettingsFile(Path(named), toml=True, service=service and not config)
    if "VOLANT_CONFIG" in variables:
        return SettingsFile(Path(variables["VOLANT_CONFIG"]), toml=True, service=service)
    if service or variables:
        return SettingsFile(_setup.ENVIRONMENT, toml=False, service=service)
    raise Failure(
        "volantd is no service on this host, and nothing says where its settings are",
        hint="name the file with --config; `volantd --config` reads it",
    )
