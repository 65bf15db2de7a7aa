"""Secrets: encrypted at rest, set by clients, and given to VMs when they boot. See docs/explanation/secrets.md."""

from ._failed import SecretFailed
from ._key_file import KeyFile
from ._secrets import Secrets
from ._values import SecretValues

__all__ = ["KeyFile", "SecretFailed", "SecretValues", "Secrets"]
