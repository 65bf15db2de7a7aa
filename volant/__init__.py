"""A control plane for microVMs on one host.

Guests run this file too, so it imports nothing.
"""

__version__ = "0.1.0"
"""The version of the package, the daemon and the guest agent; `pyproject.toml` reads it from here."""
