"""Decides changes of API keys."""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec

from volant.model import (
    MAX_API_KEYS,
    ApiKey,
    Problem,
    Role,
    administrates,
    check_create_key,
    no_such_key,
    project_of,
)

from . import messages
from ._changes import decides
from ._quotas import require_project
from ._stage import Stage

_MOST_REPLACED = 4
"""Keys of one name that were replaced and are still valid; the oldest end first."""


@decides
def _add_key(stage: Stage, message: messages.AddKey) -> ApiKey:
    request = message.request
    check_create_key(request)
    if stage.keys_of(request.name):
        raise Problem(
            409, "key-exists", f"there is a key named {request.name!r} already", field="name",
            hint=f"choose another name, or replace it with `volar keys rotate {request.name}`",
        )  # fmt: skip
    if request.role is not Role.ADMIN and not stage.keys_required and not message.has_administrator:
        raise Problem(
            409,
            "first-key-not-admin",
            "the first key has to be an administrator's: once there is a key, TCP is closed for clients without one",
            field="role",
            hint="create that one first: `volar keys create NAME --role admin`",
        )
    if len(stage.keys) >= MAX_API_KEYS:
        raise Problem(
            409, "too-many-keys", f"there are {MAX_API_KEYS} keys already, which is the limit", hint="delete one first"
        )
    project = project_of(request)
    if project is not None:
        require_project(stage, project)
    key = ApiKey(
        digest=message.digest,
        id=message.key_id,
        name=request.name,
        role=request.role,
        project=project,
        created_at=stage.now,
        created_by=message.by,
        expires_at=_after(stage.now, request.expires_in_s),
    )
    stage.put_key(key)
    stage.require_keys()
    return key


@decides
def _rotate_key(stage: Stage, message: messages.RotateKey) -> ApiKey:
    request = message.request
    before = _newest(stage, message.name)
    for key in stage.keys_of(message.name):
        # Without an overlap the former keys may be in wrong hands.
        if key is not before and (request.overlap_s == 0 or not key.is_valid(stage.now)):
            stage.drop_key(key)
    if request.overlap_s > 0 and before.is_valid(stage.now):
        until = stage.now + timedelta(seconds=request.overlap_s)
        until = until if before.expires_at is None else min(until, before.expires_at)
        stage.put_key(msgspec.structs.replace(before, replaced=True, expires_at=until))
    else:
        stage.drop_key(before)
    replaced = sorted((each for each in stage.keys_of(message.name) if each.replaced), key=lambda each: each.created_at)
    for each in replaced[:-_MOST_REPLACED]:
        stage.drop_key(each)
    key = ApiKey(
        digest=message.digest,
        id=before.id,
        name=before.name,
        role=before.role,
        project=before.project,
        created_at=stage.now,
        created_by=message.by,
        expires_at=_after(stage.now, request.expires_in_s),
    )
    stage.put_key(key)
    return key


@decides
def _remove_key(stage: Stage, message: messages.RemoveKey) -> None:
    key = _newest(stage, message.name)
    others = [each for each in stage.keys.values() if each.name != key.name]
    if not message.has_administrator and administrates([key], stage.now) and not administrates(others, stage.now):
        raise Problem(
            409,
            "last-administrator",
            f"{key.name!r} is the last administrator's key: without it only the Unix socket could manage keys",
            hint=f"create another administrator's key first; or replace this one with `volar keys rotate {key.name}`, "
            "which ends it at once",
        )
    for each in stage.keys_of(message.name):
        stage.drop_key(each)


@decides
def _note_key_uses(stage: Stage, message: messages.NoteKeyUses) -> None:
    for digest, use in message.uses.items():
        key = stage.keys.get(digest)
        if key is not None:
            stage.put_key(msgspec.structs.replace(key, used=use))


def _newest(stage: Stage, name: str) -> ApiKey:
    for key in stage.keys_of(name):
        if not key.replaced:
            return key
    raise no_such_key(name)


def _after(now: datetime, seconds: float | None) -> datetime | None:
    return None if seconds is None else now + timedelta(seconds=seconds)
