"""`volar plugins`."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import stat
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec
import trio

from volant.client import ClientProblem
from volant.images import local_path
from volant.model import ArtifactView, Boot

from ._call import FileBody
from ._complete import plugin_names
from ._run import Failure, Session, command
from ._text import safe, size

_MAX_SHOWN = 200
_NOT_READ = ("artifact-not-allowed", "artifact-unavailable")


@click.group(name="plugins")
def group() -> None:
    """Manage plugins: kinds of VMs."""


@command(group, "list")
async def list_(session: Session) -> None:
    """List plugins."""
    plugins = await session.client.plugins.list()
    rows = (
        (plugin.name, plugin.version, plugin.runtime, "yes" if plugin.enabled else "no", plugin.description)
        for plugin in plugins
    )
    session.out.listing(plugins, ("NAME", "VERSION", "RUNTIME", "ENABLED", "DESCRIPTION"), rows)


@command(group, "install")
@click.argument("manifest", type=click.Path(dir_okay=False, allow_dash=True))
async def install(session: Session, manifest: str) -> None:
    """Install a plugin from a manifest file, JSON or .toml; - reads JSON from standard input.

    Files that it names by path and that the daemon may not read for you are uploaded.
    """
    described = _read(manifest)
    try:
        plugin = await session.client.plugins.install(described)
    except ClientProblem as problem:
        files = _local_files(described)
        if problem.code not in _NOT_READ or not files:
            raise
        try:
            for sha256, path in files:
                # A manifest of a stranger may name any file of this user's: none but the one it means is sent.
                if await trio.to_thread.run_sync(_digest, path, abandon_on_cancel=True) != sha256:
                    raise Failure(
                        f"{path} is not the file that the manifest means: its SHA-256 is another; nothing was sent",
                        hint=f"`sha256sum {path}` shows it",
                    )
                await _upload(session, path, sha256)
        except OSError:
            # Nor can whoever asks: what the daemon has said is what there is to say.
            raise problem from None
        plugin = await session.client.plugins.install(described)
    session.out.result(plugin, f"{safe(plugin.name)} {safe(plugin.version)} is installed")


@command(group, "upload")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
async def upload(session: Session, file: Path) -> None:
    """Send FILE, which a manifest names, into the daemon's cache."""
    try:
        sha256 = await trio.to_thread.run_sync(_digest, file, abandon_on_cancel=True)
        sent = await _upload(session, file, sha256)
    except OSError as error:
        raise Failure(f"{file} can't be read: {error.strerror}") from None
    session.out.result(sent, f"{sent.sha256} is in the cache, {size(sent.size_bytes)}")


@command(group, "show")
@click.argument("name", shell_complete=plugin_names)
async def show(session: Session, name: str) -> None:
    """Show a plugin; with --json its manifest, as `install` takes it."""
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
    """Enable a plugin for new VMs."""
    await _enable(session, name, True)


@command(group, "disable")
@click.argument("name", shell_complete=plugin_names)
async def disable(session: Session, name: str) -> None:
    """Disable a plugin for new VMs; existing VMs go on."""
    await _enable(session, name, False)


async def _enable(session: Session, name: str, enabled: bool) -> None:
    plugin = await session.client.plugins.enable(name, enabled)
    session.out.result(plugin, f"{safe(plugin.name)} is {'enabled' if plugin.enabled else 'disabled'}")


@command(group, "remove")
@click.argument("name", shell_complete=plugin_names)
async def remove(session: Session, name: str) -> None:
    """Remove a plugin that no VM uses."""
    await session.client.plugins.remove(name)
    session.out.result({"name": name, "removed": True}, f"{safe(name)} is removed")


def _local_files(manifest: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """The files of a host that a manifest names, with their digests; none where it is no manifest."""
    try:
        boot = msgspec.convert(manifest.get("boot"), Boot | None)
    except msgspec.ValidationError:
        return []
    named = (boot.kernel, boot.initramfs, boot.rootfs) if boot is not None else ()
    return [(each.sha256, path) for each in named if each is not None and (path := local_path(each.url)) is not None]


async def _upload(session: Session, path: Path, sha256: str) -> ArtifactView:
    """:raises OSError: it can't be read"""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        figures = os.fstat(fd)
        if not stat.S_ISREG(figures.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        session.out.note(f"uploading {path}, {size(figures.st_size)}")
        return await session.client.plugins.upload(sha256, FileBody(fd), figures.st_size)
    finally:
        os.close(fd)


def _digest(path: Path) -> str:
    """:raises OSError: it can't be read, or is no regular file, which might have no end"""
    if not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
