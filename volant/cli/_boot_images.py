"""`volar boot-images`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from volant.images import (
    ANYWHERE,
    DIGEST,
    Archive,
    CachedArtifact,
    ImageError,
    Progress,
    build,
    fetch,
    list_artifacts,
    list_images,
    local_path,
    remove_artifact,
    shown,
)

from ._lazy_group import LazyGroup
from ._options import Options, Size, common, listing, pass_options
from ._output import Output
from ._run import Failure, guarded
from ._text import safe, size

cache_option = click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="VOLANT_CACHE_DIR",
    show_envvar=True,
    help="The cache folder; the default is the daemon's.",
)
_FILE = click.Path(path_type=Path)


@click.group(name="boot-images", cls=LazyGroup)
def group() -> None:
    """Manage boot images and artifacts, without a daemon."""


def _command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a function a command of the group. The function receives the output and the cache folder."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        @pass_options
        def call(options: Options, /, cache: Path | None, **given: Any) -> int:
            def work() -> None:
                try:
                    function(
                        Output(options.json, options.names),
                        cache or default_cache_dir(os.environ, os.getuid()),
                        **given,
                    )
                except ImageError as error:
                    raise Failure(error.message, hint=error.hint or None) from error

            return guarded(options, work)

        decorated: click.Command = group.command(name)(cache_option(common()(call)))
        return decorated

    return decorate


def archive_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that name the source of Debian's packages; the function gets them as `archive`."""

    @functools.wraps(function)
    def call(
        *words: Any, mirror: str | None, security_mirror: str | None, keyring: Path | None, offline: bool, **given: Any
    ) -> Any:
        if security_mirror and not mirror:
            raise click.UsageError("--security-mirror needs --mirror")
        return function(*words, archive=Archive(mirror, security_mirror, keyring, offline), **given)

    for option in (
        click.option("--offline", is_flag=True, help="Use the packages of the last build."),
        click.option("--keyring", type=_FILE, metavar="FILE", help="The keys that sign the mirror's packages."),
        click.option("--security-mirror", metavar="URL", help="With --mirror: the mirror of security updates."),
        click.option("--mirror", metavar="URL", help="A Debian mirror, instead of this host's apt sources."),
    ):
        call = option(call)
    return call


@_command("build")
@archive_options
def build_(out: Output, cache: Path, archive: Archive) -> None:
    """Build the boot image from Debian's current packages, unless it exists."""
    with _progress(out) as report:
        image = build(cache, archive=archive, progress=report)
    summary = f"image {image.digest[:12]}, kernel {safe(image.kernel_version)}, {size(image.size_bytes)}"
    out.result(image.as_json(), summary)


@_command("list")
@listing
def list_(out: Output, cache: Path) -> None:
    """List the boot images of the cache."""
    images = list_images(cache)
    rows = (
        (
            image.digest[:12],
            "yes" if image.current else "no",
            image.kernel_version,
            f"{image.min_memory_mb} MiB",
            size(image.size_bytes),
        )
        for image in images
    )
    out.listing([image.as_json() for image in images], ("IMAGE", "CURRENT", "KERNEL", "NEEDS", "SIZE"), rows)


@_command("artifacts")
@listing
def artifacts(out: Output, cache: Path) -> None:
    """List the boot artifacts of plugins in the cache."""
    found = list_artifacts(cache)
    rows = (
        (artifact.digest[:12], size(artifact.size_bytes), size(artifact.disk_bytes), safe(artifact.url))
        for artifact in found
    )
    out.listing([artifact.as_json() for artifact in found], ("ARTIFACT", "SIZE", "ON DISK", "FROM"), rows)


@_command("fetch")
@click.argument("url")
@click.argument("sha256")
@click.option("--max", "max_mb", type=Size(), metavar="SIZE", default="16G", show_default=True, help="Maximum size.")
def fetch_(out: Output, cache: Path, url: str, sha256: str, max_mb: int) -> None:
    """Fetch a boot artifact into the cache, unless it is there.

    URL is an absolute path, or a file, http or https URL; SHA256 is the digest that the file must have. Use the values
    of the plugin's manifest.
    """
    if not DIGEST.fullmatch(sha256):
        raise click.BadParameter("64 hexadecimal digits in lower case are needed", param_hint="SHA256")
    if local_path(url) is None and not url.startswith(("http://", "https://")):
        raise click.BadParameter("an absolute path, or a file, http or https URL is needed", param_hint="URL")
    try:
        with _progress(out, "Fetching") as report:
            artifact = fetch(
                cache,
                url,
                sha256,
                max_bytes=max_mb * 2**20,
                # The command has only the rights of its user, so any file is allowed.
                origins=ANYWHERE,
                tell=lambda done, total: report(Progress("fetch", "Fetching", done, total, "bytes")),
            )
    except ImageError as error:
        raise Failure(f"{safe(shown(url))}: {error.message}", hint=error.hint or None) from error
    summary = f"artifact {artifact.digest[:12]}, {size(artifact.size_bytes)}, {size(artifact.disk_bytes)} on the disk"
    out.result(artifact.as_json(), summary)


@_command("delete")
@click.argument("artifacts", metavar="SHA256...", nargs=-1, required=True)
def delete(out: Output, cache: Path, artifacts: tuple[str, ...]) -> None:
    """Delete boot artifacts from the cache, by digests or their first digits.

    An artifact that a running VM uses stays. A VM that boots later fetches it again from the URL in its manifest.
    Upload a local file again with `volar plugins upload`, unless it is in a directory of the setting artifact_dirs.
    """
    found = list_artifacts(cache)
    chosen = []
    for prefix in artifacts:
        matching = [artifact for artifact in found if len(prefix) >= 4 and artifact.digest.startswith(prefix)]
        if len(matching) != 1:
            raise Failure(
                f"{len(matching) or 'no'} boot artifacts have a digest that begins with {safe(prefix)}",
                hint="`volar boot-images artifacts` lists them; at least four digits are needed",
            )
        chosen += matching
    deleted: list[CachedArtifact] = []
    held: list[CachedArtifact] = []
    for artifact in chosen:
        (deleted if remove_artifact(cache, artifact.digest) else held).append(artifact)
    if out.json:
        out.document([artifact.as_json() for artifact in deleted])
    else:
        for artifact in deleted:
            out.line(f"{artifact.digest[:12]} is deleted, {size(artifact.disk_bytes)}")
    if held:
        raise Failure(
            f"a VM runs on {', '.join(artifact.digest[:12] for artifact in held)}, which stays",
            hint="stop it first; `volar system df` shows what uses it",
        )


def default_cache_dir(environ: Mapping[str, str], uid: int) -> Path:
    """Returns the default cache folder of a daemon of this user."""
    if uid == 0:
        return Path("/var/cache/volant")
    return Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/nonexistent")) / ".cache") / "volant"


@contextmanager
def _progress(out: Output, title: str = "Building the image") -> Iterator[Callable[[Progress], None]]:
    """Shows a bar on a terminal, otherwise a line for each phase; nothing with --json."""
    if out.json:
        yield lambda progress: None
        return
    if not sys.stderr.isatty():
        phase = ""

        def report(progress: Progress) -> None:
            nonlocal phase
            if progress.phase != phase:
                phase = progress.phase
                out.note(progress.message)

        yield report
        return

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress as Bar, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def draw(progress: Progress) -> None:
            bar.update(
                task,
                description=escape(safe(progress.message)),
                completed=progress.done,
                total=progress.total or None,
            )

        yield draw
