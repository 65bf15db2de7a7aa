"""`volar images build`: stock images, built on this machine and sent to the daemon."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import trio

from volant.images import STOCK, BuiltStock, ImageError, Progress, build_stock
from volant.model import ImageView

from ._boot_images import cache_option, default_cache_dir
from ._call import FileBody
from ._output import Output
from ._run import Failure
from ._streaming import Session, command
from ._text import safe, size


@command(None, "build")
@click.argument("name", type=click.Choice(sorted(STOCK)))
@click.option("--reference", metavar="REF", help="The image's reference; the default is `localhost/NAME:VERSION`.")
@click.option("--mirror", metavar="URL", help="A Debian mirror, instead of this host's apt sources.")
@click.option("--security-mirror", metavar="URL", help="With --mirror: the mirror of security updates.")
@click.option(
    "--keyring", type=click.Path(path_type=Path), metavar="FILE", help="The keys that sign the mirror's packages."
)
@click.option("--offline", is_flag=True, help="Use the packages of the last build.")
@cache_option
async def build(
    session: Session,
    name: str,
    reference: str | None,
    mirror: str | None,
    security_mirror: str | None,
    keyring: Path | None,
    offline: bool,
    cache: Path | None,
) -> None:
    """Build an image of debian, python or node from Debian's packages, without a registry.

    The packages are fetched and the image is built on this machine, without root. Then it is sent to the daemon.
    """
    if security_mirror and not mirror:
        raise click.UsageError("--security-mirror needs --mirror")
    work = partial(build_stock, mirror=mirror, security_mirror=security_mirror, keyring=keyring, offline=offline)
    image, called, packages = await built(session, name, cache, reference, work)
    said = f"{safe(called)}, {packages} packages, {size(image.size_bytes)}"
    session.out.result(image, f"{said}; `volar run {safe(called)}` starts a VM of it")


async def built(
    session: Session,
    name: str,
    cache: Path | None = None,
    reference: str | None = None,
    work: Callable[..., BuiltStock] = build_stock,
) -> tuple[ImageView, str, int]:
    """Builds a stock image and sends it to the daemon. Returns the image, its reference and the number of its packages.

    :raises Failure:
    """
    folder = (cache or default_cache_dir(os.environ, os.getuid())) / "stock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".archive-") as scratch:
            archive = Path(scratch) / "image.tar"
            # An interrupt must not leave a build behind that writes into the cache.
            made = await trio.to_thread.run_sync(partial(work, name, archive, folder, progress=_notes(session.out)))
            session.out.note(f"sending {size(made.size_bytes)}")
            called = reference or made.reference
            with archive.open("rb") as handle:
                image = await session.client.images.load(FileBody(handle.fileno()), made.size_bytes, called)
    except ImageError as error:
        raise Failure(error.message, hint=error.hint or None) from error
    except OSError as error:
        raise Failure(f"the image can't be built in {folder}: {error.strerror or error}") from error
    return image, called, made.packages


def _notes(out: Output) -> Callable[[Progress], None]:
    """Returns a function that prints each phase once."""
    shown: set[str] = set()

    def note(progress: Progress) -> None:
        if progress.message not in shown and len(shown) < 100:
            shown.add(progress.message)
            out.note(safe(progress.message))

    return note
