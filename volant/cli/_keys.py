"""`volar keys`."""

from __future__ import annotations

import click

from volant.client import KeysOperations
from volant.model import ApiKeyView, CreateApiKey, NewApiKey, Role

from ._derived import Shown, add_commands
from ._lazy_group import LazyGroup
from ._output import Output
from ._run import Duration, Session, command, project_of
from ._shown import Sheet, text_of


@click.group(name="keys", cls=LazyGroup, default="list")
def group() -> None:
    """Manage API keys: their roles, projects and expiry.

    Without a command, list them. A viewer sees VMs. A user also works in them: commands, files, logs, ports. An
    operator also creates and deletes them. An administrator also manages the daemon and its keys.
    """


@command(group, "create")
@click.argument("key")
@click.option("--role", type=click.Choice([role.value for role in Role]), required=True, help="Role of the key.")
@click.option(
    "--expires",
    "expires_in_s",
    type=Duration(),
    help="How long the new key is valid, such as 12h or 30d.  [default: it does not expire]",
)
async def create(session: Session, key: str, role: str, expires_in_s: float | None) -> None:
    """Create an API key and print it. It can't be shown again.

    The key is for the project of --project, by default for `default`; with the role admin it is for all projects. The
    first key must have the role admin: from then on, clients over TCP need a key.
    """
    project = None if role == Role.ADMIN else project_of(session.options)
    request = CreateApiKey(name=key, role=Role(role), project=project, expires_in_s=expires_in_s)
    _print(session.out, await session.client.keys.create(request))


def _print(out: Output, made: NewApiKey) -> None:
    out.result(made, made.key)
    out.note(f"save the key {made.name}, because it can't be shown again")


def _expiry(key: ApiKeyView) -> str:
    return f"{text_of('expires_at', key.expires_at)}{', expired' if key.expired else ''}" if key.expires_at else "never"


_SHEET = Sheet(
    ("name", "role", "project", "expires_at", "last_used_at", "last_used_from"),
    cells={"role": lambda key: key.role.value, "project": lambda key: key.project or "all", "expires_at": _expiry},
)
add_commands(group, "keys", KeysOperations, Shown({ApiKeyView: _SHEET, NewApiKey: _print}))
