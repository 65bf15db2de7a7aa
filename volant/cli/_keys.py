"""`volar keys`."""

from __future__ import annotations

import click

from volant.client import KeysOperations
from volant.model import ApiKeyView, CreateApiKey, NewApiKey, Role, RotateApiKey

from ._complete import key_names
from ._derived import add_commands
from ._lazy_group import LazyGroup
from ._options import listing
from ._output import Output
from ._run import Duration, Session, command, project_of


@click.group(name="keys", cls=LazyGroup, default="list")
def group() -> None:
    """Manage API keys: their roles, projects and expiry.

    Without a command, list them. A viewer sees VMs. A user also works in them: commands, files, logs, ports. An
    operator also creates and deletes them. An administrator also manages the daemon and its keys.
    """


key_argument = click.argument("key", shell_complete=key_names)
expires_option = click.option(
    "--expires",
    "expires_in_s",
    type=Duration(),
    help="How long the new key is valid, such as 12h or 30d.  [default: it does not expire]",
)


@command(group, "list")
@listing
async def list_(session: Session) -> None:
    """List API keys, with the time and address of their last use."""
    keys = await session.client.keys.list()
    rows = (
        (
            each.name,
            each.role.value,
            each.project or "all",
            _expiry(each),
            _time(each.last_used_at),
            each.last_used_from,
        )
        for each in keys
    )
    titles = ("NAME", "ROLE", "PROJECT", "EXPIRES (UTC)", "LAST USED (UTC)", "FROM")
    session.out.listing(keys, titles, rows)


@command(group, "create")
@click.argument("key")
@click.option("--role", type=click.Choice([role.value for role in Role]), required=True, help="Role of the key.")
@expires_option
async def create(session: Session, key: str, role: str, expires_in_s: float | None) -> None:
    """Create an API key and print it. It can't be shown again.

    The key is for the project of --project, by default for `default`; with the role admin it is for all projects. The
    first key must have the role admin: from then on, clients over TCP need a key.
    """
    project = None if role == Role.ADMIN else project_of(session.options)
    request = CreateApiKey(name=key, role=Role(role), project=project, expires_in_s=expires_in_s)
    _print(session.out, await session.client.keys.create(request), "is created")


@command(group, "get")
@key_argument
async def get(session: Session, key: str) -> None:
    """Show the role, project, expiry and last use of an API key."""
    _show(session.out, await session.client.keys.get(key))


@command(group, "rotate")
@key_argument
@click.option(
    "--overlap", "overlap_s", type=Duration(), default=0.0, help="How long the current key stays valid.  [default: 0s]"
)
@expires_option
async def rotate(session: Session, key: str, overlap_s: float, expires_in_s: float | None) -> None:
    """Replace an API key by a new one with the same role, and print the new key. It can't be shown again.

    Without --overlap, the current key becomes invalid at once, and its requests and streams end.
    """
    request = RotateApiKey(overlap_s=overlap_s, expires_in_s=expires_in_s)
    _print(session.out, await session.client.keys.rotate(key, request), "is replaced")


def _print(out: Output, made: NewApiKey, done: str) -> None:
    out.result(made, made.key)
    out.note(f"key {made.name} {done}; save it, because it can't be shown again")


def _show(out: Output, key: ApiKeyView) -> None:
    out.facts(
        key,
        [
            ("name", key.name),
            ("role", key.role.value),
            ("project", key.project or "all"),
            ("created", f"{_time(key.created_at)} UTC by {key.created_by}"),
            ("expires", _expiry(key)),
            ("last used", "never" if key.last_used_at is None else f"{_time(key.last_used_at)} UTC"),
            ("from", key.last_used_from),
            *(("replaced, valid until", f"{_time(each.expires_at)} UTC") for each in key.replaced),
        ],
    )


def _expiry(key: ApiKeyView) -> str:
    if key.expires_at is None:
        return "never"
    return f"{_time(key.expires_at)}{', expired' if key.expired else ''}"


def _time(at: object) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S}"


add_commands(group, "keys", KeysOperations)
