"""`volantd`: loads the settings, assembles the daemon and runs it."""

from ._daemon import Daemon
from ._run import DaemonError
from ._settings import Settings, SettingsError

__all__ = ["Daemon", "DaemonError", "Settings", "SettingsError"]
