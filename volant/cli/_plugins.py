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

from volant.client import ClientProblem, PluginsOperations
from volant.model import PluginView

from ._complete import plugin_names
from ._derived import Shown, add_commands
from ._lazy_group import Lazy, LazyGroup
from ._run import Failure, Session, command
from ._shown import Sheet
from ._text import safe

_MAX_SHOWN = 200


_LAZY = {"upload": Lazy("_upload:upload", "Upload FILE, which a manifest names, to the daemon's cache.")}


@click.group(name="plugins", cls=LazyGroup, lazy=_LAZY)
def group() -> None:
    """Manage plugins: kinds of VMs."""


@command(group, "install")
@click.argument("manifest", type=click.Path(dir_okay=False, allow_dash=True))
async def install(session: Session, manifest: str) -> None:
    """Install a plugin from a manifest file, JSON or .toml; - reads JSON from standard input.

    Files that the manifest names by path are uploaded if the daemon may not read them.
    """
    described = _read(manifest)
    try:
        plugin = await session.client.plugins.install(described)
    except ClientProblem as problem:
        if problem.code != "artifact-not-allowed":
            raise
        from ._upload import local_files, upload_files

        if not (files := local_files(described)):
            raise
        try:
            session.stream(lambda streaming: upload_files(streaming, files))
        except OSError:
            # This user can't read the file either, so report the daemon's error.
            raise problem from None
        plugin = await session.client.plugins.install(described)
    session.out.result(plugin, f"{safe(plugin.name)} {safe(plugin.version)} is installed")


@command(group, "get")
@click.argument("name", shell_complete=plugin_names)
async def get(session: Session, name: str) -> None:
    """Show a plugin; with --json its manifest, in the form that `install` accepts."""
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
    """Shortens a text, as an entrypoint may contain a whole program."""
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def _inputs(schema: Mapping[str, Any] | None) -> list[str]:
    """Returns the members that an action takes, if its schema lists them; required ones with a star."""
    members = (schema or {}).get("properties")
    required = (schema or {}).get("required")
    stars = required if isinstance(required, list) else []
    return [f"{name}{'*' if name in stars else ''}" for name in members] if isinstance(members, dict) else []


@command(group, "enable")
@click.argument("name", shell_complete=plugin_names)
async def enable(session: Session, name: str) -> None:
    """Enable a plugin for new VMs."""
    await _enable(session, name, True)


@command(group, "disable")
@click.argument("name", shell_complete=plugin_names)
async def disable(session: Session, name: str) -> None:
    """Disable a plugin for new VMs; existing VMs are not affected."""
    await _enable(session, name, False)


async def _enable(session: Session, name: str, enabled: bool) -> None:
    plugin = await session.client.plugins.enable(name, enabled)
    session.out.result(plugin, f"{safe(plugin.name)} is {'enabled' if plugin.enabled else 'disabled'}")


def _read(manifest: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if manifest == "-" else Path(manifest).read_text()
        value = tomllib.loads(text) if manifest.endswith(".toml") else json.loads(text)
    except OSError as error:
        raise Failure(f"{manifest} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Failure(f"{manifest} can't be parsed: {error}", hint="a manifest is a JSON or TOML file") from None
    if not isinstance(value, dict):
        raise Failure(f"{manifest} is no manifest: a manifest is an object")
    return value


add_commands(
    group,
    "plugins",
    PluginsOperations,
    Shown({PluginView: Sheet(("name", "version", "runtime", "enabled", "description"))}),
    besides=["manifest", "enable"],
)
