"""Decides changes of secrets. Their values come encrypted."""

from __future__ import annotations

import msgspec

from volant.model import MAX_SECRETS, Key, Problem, Secret, check_name, no_such_secret, secrets_of

from . import messages
from ._changes import check_count, check_unused, decides
from ._quotas import require_project
from ._stage import Stage

MAX_SECRETS_OF_PROJECT = 200
"""So that no project takes what all have together."""


@decides
def _seal_secret(stage: Stage, message: messages.SealSecret) -> Secret:
    key = message.named
    check_name(key.name, "name")
    before = stage.secrets.get(key)
    if message.version != 1 + (0 if before is None else before.version):
        raise _changed(key)
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
        raise _changed(message.named)
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


def _changed(key: Key) -> Problem:
    return Problem(
        409, messages.VERSION_CHANGED, f"the secret {key.name!r} has changed meanwhile", hint="send the request again"
    )
