"""Which of the users and groups that are reserved for sandboxes (the setting `vm_uids`) have which purpose."""

from __future__ import annotations

import hashlib


def numbered(users: range, name: str) -> int:
    """Returns the group that follows from a name, such as the fingerprint of a file."""
    return users[number_of(name) % len(users)]


def number_of(name: str) -> int:
    """Returns a number that follows from a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])


def user_of_passt(users: range) -> int:
    """Returns the user of passt: the last one."""
    return users[-1]


def user_of_images(users: range) -> int:
    """Returns the user of the programs that fetch and convert images: the last but one."""
    return users[-2]


def users_without_vm(users: range) -> range:
    """Returns the users of hypervisors that have no VM yet: the third quarter."""
    return users[len(users) // 2 : len(users) * 3 // 4]


def users_of_restricted_passt(users: range) -> range:
    """Returns the users of passts whose destinations have rules of their own: the last quarter, without those above."""
    return users[len(users) * 3 // 4 : -2]
