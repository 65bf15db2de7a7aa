"""What every check is given."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from volant.host import Host

from .._settings import Settings

Device = Literal["there", "denied", "missing"]


@dataclass(frozen=True)
class Given:
    """The host, the daemon's settings, and a directory in which anything may be written."""

    host: Host
    settings: Settings
    scratch: Path


def user() -> str:
    """The name of whoever asks, or the number of one who has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def device(path: str) -> Device:
    """Whether a device is there and may be opened."""
    if os.access(path, os.R_OK | os.W_OK):
        return "there"
    return "denied" if os.path.lexists(path) else "missing"


def group_of(path: str) -> str:
    """The group whose members may open a device; empty where none but root may."""
    try:
        status = Path(path).stat()
        return grp.getgrgid(status.st_gid).gr_name if status.st_gid != 0 and status.st_mode & 0o060 == 0o060 else ""
    except (OSError, KeyError):
        return ""


def let_in(path: str) -> str:
    """The command that lets this user open a device."""
    group = group_of(path)
    if group:
        return f"`sudo usermod -aG {group} {user()}`, then log in again"
    return f"run as root; or see why none but root may open {path}: udev's rules give it to a group"
