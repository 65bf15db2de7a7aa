"""Permissions: what a caller has to be allowed."""

from __future__ import annotations

from enum import StrEnum


class Permission(StrEnum):
    """What a caller has to be allowed for an operation."""

    PUBLIC = "public"
    """Nothing: neither a key nor a role."""
    VIEW = "view"
    """Read what the daemon knows of VMs and of itself."""
    USE = "use"
    """Reach into guests: commands, files, ports, consoles."""
    CONTROL = "control"
    """Create, change and delete VMs and what belongs to them."""
    ADMIN = "admin"
    """Change what all share: plugins, templates, the daemon itself."""
