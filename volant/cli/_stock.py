"""`volar images build`: stock images, built on this machine and sent to the daemon."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from volant.images import STOCK, Archive, ImageError, Progress, build_stock_in_child
from volant.model import ImageView

from ._boot_images import archive_options, cache_option, default_cache_dir
from ._call import FileBody
from ._output import Output
from ._run import Failure
from ._streaming import Session, command
from ._text import safe, size


@command(None, "build")
@click.argument("name", type=click.Choice(sorted(STOCK)))
@click.option("--reference", metavar="REF", help="The image's reference; the default is `localhost/NAME:VERSION`.")
@archive_options
@cache_option
async def build(session: Session, name: str, reference: str | None, archive: Archive, cache: Path | None) -> None:
    """Build an image of debian, python or node from Debian's packages, without a registry.

    mmdebstrap fetches and installs the packages on this machine, without root. Then it is sent to the daemon.
    """
    image, called, packages = await built(session, name, cache, reference, archive)
    said = f"{safe(called)}, {packages} packages, {size(image.size_bytes)}"
    session.out.result(image, f"{said}; `volar run {safe(called)}` starts a VM of it")


async def built(
    session: Session,
    name: str,
    cache: Path | None = None,
    reference: str | None = None,
    archive: Archive | None = None,
) -> tuple[ImageView, str, int]:
    """Builds a stock image and sends it to the daemon. Returns the image, its reference and the number of its packages.

    :raises Failure:
    """
    folder = (cache or default_cache_dir(os.environ, os.getuid())) / "stock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".archive-") as scratch:
            file = Path(scratch) / "image.tar"
            progress = _notes(session.out)
            made = await build_stock_in_child(name, file, folder, archive=archive or Archive(), progress=progress)
            session.out.note(f"sending {size(made.size_bytes)}")
            called = reference or made.reference
            with file.open("rb") as handle:
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
