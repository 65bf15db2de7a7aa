"""Secrets: encrypted at rest, set by clients, and sent to VMs when they boot. See docs/explanation/secrets.md."""

from ._key_file import KeyFile as KeyFile, SecretFailed as SecretFailed
from ._secrets import Secrets as Secrets, SecretValues as SecretValues
