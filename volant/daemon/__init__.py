"""`volantd`: loads the settings, assembles the daemon and runs it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._daemon import Daemon
    from ._run import DaemonError
    from ._settings import Settings, SettingsError
else:
    # `main` is imported from here, too, and decides how the daemon is imported.
    _MODULES = {"Daemon": "_daemon", "DaemonError": "_run", "Settings": "_settings", "SettingsError": "_settings"}

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


__all__ = ["Daemon", "DaemonError", "Settings", "SettingsError"]
