"""Decides changes of API keys, projects and secrets. The values of secrets come encrypted."""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec

from volant.model import (
    DEFAULT_PROJECT,
    MAX_API_KEYS,
    MAX_SECRETS,
    ApiKey,
    Key,
    Problem,
    Project,
    Role,
    Secret,
    administrates,
    check_create_key,
    check_name,
    first_few,
    no_such_key,
    no_such_project,
    no_such_secret,
    parse_egress,
    project_of,
    secrets_of,
)

from . import messages
from ._changes import check_count, check_unused, decides
from ._quotas import require_project
from ._stage import Stage

MAX_SECRETS_OF_PROJECT = 200
"""Maximum per project, so that none uses up what all share."""


@decides
def _seal_secret(stage: Stage, message: messages.SealSecret) -> Secret:
    key = message.named
    check_name(key.name, "name")
    before = stage.secrets.get(key)
    if message.version != 1 + (0 if before is None else before.version):
        raise _secret_changed(key)
    require_project(stage, key.project)
    if before is None:
        check_count("secret", stage.secrets.values(), key.project, MAX_SECRETS_OF_PROJECT)
        if len(stage.secrets) >= MAX_SECRETS:
            raise Problem(
                409, "too-many-secrets", f"there are {MAX_SECRETS} secrets already, which is the limit",
                hint="delete one first",
            )  # fmt: skip
    secret = Secret(
        name=key.name,
        project=key.project,
        version=message.version,
        key_id=message.key_id,
        sealed=message.sealed,
        created_at=stage.now if before is None else before.created_at,
        updated_at=stage.now,
    )
    stage.put(secret)
    return secret


@decides
def _reencrypt_secret(stage: Stage, message: messages.ReencryptSecret) -> Secret:
    before = stage.secrets.get(message.named)
    if before is None or message.version != before.version:
        raise _secret_changed(message.named)
    secret = msgspec.structs.replace(before, key_id=message.key_id, sealed=message.sealed)
    stage.put(secret)
    return secret


@decides
def _remove_secret(stage: Stage, message: messages.RemoveSecret) -> None:
    secret = stage.secrets.get(message.named)
    if secret is None:
        raise no_such_secret(message.named.name)
    users = [row for row in stage.all_rows() if row.project == secret.project and secret.name in secrets_of(row)]
    check_unused("secret", secret.name, users, "delete them first, or set the secret to another value")
    stage.drop(secret)


def _secret_changed(key: Key) -> Problem:
    return Problem(
        409, messages.VERSION_CHANGED, f"the secret {key.name!r} has changed meanwhile", hint="send the request again"
    )


_MAX_PROJECTS = 1000


@decides
def _add_project(stage: Stage, message: messages.AddProject) -> Project:
    request = message.request
    name = check_name(request.name, "name")
    if stage.project(Key(name, name)) is not None:
        raise Problem(
            409, "project-exists", f"there is a project named {name!r} already", field="name",
            hint="choose another name",
        )  # fmt: skip
    if len(stage.projects) >= _MAX_PROJECTS:
        raise Problem(
            409, "too-many-projects", f"there are {_MAX_PROJECTS} projects already, which is the limit",
            hint="delete one first",
        )  # fmt: skip
    project = Project(name=name, quota=request.quota, egress=parse_egress(request.egress), created_at=stage.now)
    stage.put(project)
    return project


@decides
def _set_quota(stage: Stage, message: messages.SetQuota) -> Project:
    """A project may have more than the new limit already; then it can't create more."""
    return _changed(stage, message.project, quota=message.quota)


@decides
def _set_egress(stage: Stage, message: messages.SetProjectEgress) -> Project:
    """VMs that it has already keep their policies."""
    return _changed(stage, message.project, egress=parse_egress(message.egress))


def _changed(stage: Stage, name: str, **members: object) -> Project:
    before = require_project(stage, name)
    project = msgspec.structs.replace(before, **members)
    if project != before:
        stage.put(project)
    return project


@decides
def _remove_project(stage: Stage, message: messages.RemoveProject) -> None:
    name = message.project
    project = stage.project(Key(name, name))
    if project is None:
        raise no_such_project(name)
    if name == DEFAULT_PROJECT:
        raise Problem(409, "project-built-in", f"project {name!r} always exists, and can't be deleted")
    left = [f"VM {row.name}" for row in stage.all_rows() if row.project == name]
    left += [f"{kind} {one.name}" for kind, one in stage.everything_named() if one.project == name and one != project]
    left += [f"key {key.name}" for key in stage.keys.values() if key.project == name]
    if left:
        raise Problem(
            409, "project-in-use", f"project {name!r} is not empty: {first_few(left)}", hint="delete these first"
        )
    stage.drop(project)


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
