"""Secrets: values that VMs receive and that the API never returns."""

from __future__ import annotations

from volant.model import Permission, ReencryptedSecrets, SecretView, SetSecret

from ._context import Context
from ._table import TABLE, Tool

_ONE = "/api/v1/secrets/{name}"


@TABLE.operation(
    "GET /api/v1/secrets",
    permission=Permission.VIEW,
    answer="The secrets without their values, by name",
    tool=Tool(
        title="List secrets",
        description="List the names of the secrets that vms_create can pass to a VM, in `env` as "
        '`{"secret": NAME}` or in `secrets` as the file /run/secrets/NAME. You can\'t read or set their values; ask a '
        "person to run `volar secrets set NAME`.",
    ),
)
async def list_secrets(context: Context) -> list[SecretView]:
    """List secrets, which VMs receive as environment variables or files. Their values are never shown."""
    return await context.deps.vms.secrets.views(context.listed)


@TABLE.operation(f"GET {_ONE}", permission=Permission.VIEW, answer="The secret, without its value")
async def get_secret(context: Context, name: str) -> SecretView:
    """Get a secret's metadata and the VMs that refer to it. Its value is never shown."""
    return await context.deps.vms.secrets.view(context.named(name))


@TABLE.operation(
    f"PUT {_ONE}",
    permission=Permission.CONTROL,
    answer="The secret, without its value; durable",
    errors=(409, 503),
    journaled=True,
    examples={"Text": {"value": "correct horse battery staple"}},
)
async def set_secret(context: Context, name: str, *, body: SetSecret) -> SecretView:
    """Set the value of a new or present secret.

    It is stored encrypted. VMs that refer to it receive the value at their next boot.
    """
    return await context.deps.vms.secrets.set(context.named(name), body)


@TABLE.operation(f"DELETE {_ONE}", permission=Permission.CONTROL, answer="Deleted", errors=(409, 503), journaled=True)
async def delete_secret(context: Context, name: str) -> None:
    """Delete a secret that no VM refers to, running or not."""
    await context.deps.vms.secrets.delete(context.named(name))


@TABLE.operation(
    # Not below `/secrets`, where a secret may have any name.
    "POST /api/v1/system/secrets/reencrypt",
    permission=Permission.ADMIN,
    answer="The result",
    errors=(503,),
    client="secrets.reencrypt",
    client_timeout_s=300,
)
async def reencrypt_secrets(context: Context) -> ReencryptedSecrets:
    """Re-encrypt the secrets of all projects with the first key of the key file. Put the new key there first.

    An interrupted request can be repeated.
    """
    return await context.deps.vms.secrets.reencrypt()
