"""`volar plugins`."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import click

from ._run import Failure, Session, command
from ._text import safe


@click.group(name="plugins")
def group() -> None:
    """Install and list kinds of VMs."""


@command(group, "list")
async def list_(session: Session) -> None:
    """List plugins."""
    plugins = await session.client.plugins.list()
    if session.out.json:
        session.out.document(plugins)
        return
    rows = [
        (plugin.name, plugin.version, plugin.runtime, "yes" if plugin.enabled else "no", plugin.description)
        for plugin in plugins
    ]
    session.out.table(("NAME", "VERSION", "RUNTIME", "ENABLED", "DESCRIPTION"), rows)


@command(group, "install")
@click.argument("manifest", type=click.Path(dir_okay=False, allow_dash=True))
async def install(session: Session, manifest: str) -> None:
    """Install the plugin that the file MANIFEST describes, in JSON, or in TOML when it is called so; - reads JSON."""
    plugin = await session.client.plugins.install(_read(manifest))
    if session.out.json:
        session.out.document(plugin)
    else:
        session.out.line(f"{safe(plugin.name)} {safe(plugin.version)} is installed")


@command(group, "remove")
@click.argument("name")
async def remove(session: Session, name: str) -> None:
    """Remove a plugin that no VM uses."""
    await session.client.plugins.remove(name)
    if session.out.json:
        session.out.document({"name": name, "removed": True})
    else:
        session.out.line(f"{safe(name)} is removed")


def _read(manifest: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if manifest == "-" else Path(manifest).read_text()
        value = tomllib.loads(text) if manifest.endswith(".toml") else json.loads(text)
    except OSError as error:
        raise Failure(f"{manifest} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise Failure(f"{manifest} is not understood: {error}", hint="a manifest is a JSON or TOML file") from None
    if not isinstance(value, dict):
        raise Failure(f"{manifest} is not understood: a manifest is an object")
    return value
