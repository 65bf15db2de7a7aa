"""The context of every check, and shared questions about devices."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from volant.host import Host

from .._settings import Settings

Device = Literal["usable", "denied", "missing"]


@dataclass(frozen=True)
class Context:
    """The host, the daemon's settings and a scratch directory."""

    host: Host
    settings: Settings
    scratch: Path


def user() -> str:
    """Returns the name of the current user, or its number if it has no name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def device(path: str) -> Device:
    """Returns whether this user can open a device."""
    if os.access(path, os.R_OK | os.W_OK):
        return "usable"
    return "denied" if os.path.lexists(path) else "missing"


def access_advice(path: str) -> str:
    """Returns the command that lets this user open a device."""
    group = _group_of(path)
    if group:
        return f"`sudo usermod -aG {group} {user()}`, then log in again"
    return f"run as root, or give {path} to a group in a udev rule"


def _group_of(path: str) -> str:
    """Returns the group that can open a device, or an empty string if only root can."""
    try:
        status = Path(path).stat()
        return grp.getgrgid(status.st_gid).gr_name if status.st_gid != 0 and status.st_mode & 0o060 == 0o060 else ""
    except (OSError, KeyError):
        return ""
