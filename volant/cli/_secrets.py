"""`volar secrets`, and the options that pass secrets to a VM.

A value is only read from standard input: every user of the host can read the arguments of a process, and shells store
them.
"""

from __future__ import annotations

import base64
import sys

import click

from volant.client import SecretsOperations
from volant.model import MAX_SECRET_BYTES, SecretView, SetSecret

from ._complete import secret_names
from ._derived import Shown, add_commands
from ._lazy_group import LazyGroup
from ._run import Failure, Session, command
from ._shown import Sheet
from ._text import safe


@click.group(name="secrets", cls=LazyGroup)
def group() -> None:
    """Manage tokens, passwords and keys for VMs.

    `volar run --env-secret TOKEN=NAME` passes one to a VM as an environment variable, `--secret NAME` as the file
    /run/secrets/NAME. Values are never shown.
    """


secret_argument = click.argument("secret", shell_complete=secret_names)


@command(group, "set")
@secret_argument
async def set_(session: Session, secret: str) -> None:
    """Set a secret to the standard input, or to a value that you type without echo.

    The bytes are stored unchanged, including a final line feed: use `printf %s`, not `echo`. VMs that refer to the
    secret receive the value at their next boot.
    """
    request = SetSecret(value=base64.b64encode(_value(secret)).decode(), encoding="base64")
    made = await session.client.secrets.set(secret, request)
    session.out.result(made, f"secret {safe(made.name)} is set, version {made.version}")


def _value(secret: str) -> bytes:
    if sys.stdin.isatty():
        typed: str = click.prompt(f"Value of {secret}", hide_input=True, confirmation_prompt=True, err=True)
        return typed.encode()
    value = sys.stdin.buffer.read(MAX_SECRET_BYTES + 1)
    if not value:
        raise Failure("standard input is empty", hint=f"for example: volar secrets set {secret} < FILE")
    if len(value) > MAX_SECRET_BYTES:
        raise Failure(f"the value has more than {MAX_SECRET_BYTES} bytes, which is the limit")
    return value


add_commands(
    group,
    "secrets",
    SecretsOperations,
    Shown({SecretView: Sheet(("name", "version", "updated_at", "used_by", "readable"))}),
)
