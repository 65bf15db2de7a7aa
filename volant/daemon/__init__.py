"""`volantd`: loads the settings, assembles the daemon and runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volant import lazy_exports

if TYPE_CHECKING:
    from ._daemon import Daemon
    from ._run import DaemonError
    from ._settings import Settings, SettingsError
else:
    # `main` is imported from here, too, and decides how the daemon is imported.
    _MODULES = {"Daemon": "_daemon", "DaemonError": "_run", "Settings": "_settings", "SettingsError": "_settings"}

    __getattr__ = lazy_exports(__name__, _MODULES)


__all__ = ["Daemon", "DaemonError", "Settings", "SettingsError"]
