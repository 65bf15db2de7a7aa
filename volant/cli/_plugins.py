"""`volar plugins`."""

from __future__ import annotations

import json
import shlex
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ._complete import plugin_names
from ._run import Failure, Session, command
from ._text import safe

_MAX_SHOWN = 200


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


@command(group, "show")
@click.argument("name", shell_complete=plugin_names)
async def show(session: Session, name: str) -> None:
    """Show what a plugin is made of; with --json its manifest, as `install` takes it."""
    manifest = await session.client.plugins.manifest(name)
    if session.out.json:
        session.out.document(manifest)
        return
    plugin = await session.client.plugins.get(name)
    workload = manifest.workload
    session.out.fields(
        [
            ("name", plugin.name),
            ("version", plugin.version),
            ("description", plugin.description),
            ("runtime", plugin.runtime),
            ("enabled", plugin.enabled),
            ("installed", plugin.created_at or "built in"),
            ("needs", f"{manifest.resources.cpu_cores} vCPUs, {manifest.resources.memory_mb} MiB"),
            ("workload", _shortened(shlex.join(workload.entrypoint)) if workload else None),
            ("port", workload.port if workload else None),
            ("openapi", "in the manifest" if isinstance(manifest.openapi, dict) else manifest.openapi),
            ("labels", plugin.labels),
        ]
    )
    if manifest.actions:
        session.out.line("")
        rows = [
            (action, f"{called.method} {called.path}", ", ".join(_inputs(called.input)), called.description)
            for action, called in sorted(manifest.actions.items())
        ]
        session.out.table(("ACTION", "REQUEST", "TAKES", "DESCRIPTION"), rows)


def _shortened(text: str) -> str:
    """A program may be written out in its arguments."""
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def _inputs(schema: Mapping[str, Any] | None) -> list[str]:
    """The members that an action takes, as far as its schema says so plainly; those that must be there with a star."""
    members = (schema or {}).get("properties")
    required = (schema or {}).get("required")
    stars = required if isinstance(required, list) else []
    return [f"{name}{'*' if name in stars else ''}" for name in members] if isinstance(members, dict) else []


@command(group, "enable")
@click.argument("name", shell_complete=plugin_names)
async def enable(session: Session, name: str) -> None:
    """Let new VMs use a plugin."""
    await _enable(session, name, True)


@command(group, "disable")
@click.argument("name", shell_complete=plugin_names)
async def disable(session: Session, name: str) -> None:
    """Keep new VMs from a plugin; those that there are go on."""
    await _enable(session, name, False)


async def _enable(session: Session, name: str, enabled: bool) -> None:
    plugin = await session.client.plugins.enable(name, enabled)
    if session.out.json:
        session.out.document(plugin)
    else:
        session.out.line(f"{safe(plugin.name)} is {'enabled' if plugin.enabled else 'disabled'}")


@command(group, "remove")
@click.argument("name", shell_complete=plugin_names)
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
    except (ValueError, RecursionError) as error:
        raise Failure(f"{manifest} is not understood: {error}", hint="a manifest is a JSON or TOML file") from None
    if not isinstance(value, dict):
        raise Failure(f"{manifest} is not understood: a manifest is an object")
    return value
