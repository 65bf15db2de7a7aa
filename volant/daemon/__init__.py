"""`volantd`: settings, the assembly of the tree, and its end."""

from ._daemon import Daemon, DaemonError
from ._settings import Settings, SettingsError

__all__ = ["Daemon", "DaemonError", "Settings", "SettingsError"]
