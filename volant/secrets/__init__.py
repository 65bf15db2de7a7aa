"""Secrets: encrypted at rest, set by clients, and given to VMs when they boot. See docs/explanation/secrets.md."""

from ._key_file import KeyFile, SecretFailed
from ._secrets import Secrets, SecretValues

__all__ = ["KeyFile", "SecretFailed", "SecretValues", "Secrets"]
