"""`volar images`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from volant.client import ImagesOperations
from volant.model import ImageView, PrunedImages, PullImage

from ._derived import Shown, add_commands
from ._image_options import registry_options
from ._lazy_group import Lazy, LazyGroup
from ._output import Output
from ._registry_auth import registry_auth
from ._run import Failure, Session, command
from ._shown import Sheet, show_one
from ._text import safe, size, span

if TYPE_CHECKING:
    from ._streaming import Session as Streaming

_DIGEST = re.compile(r"(?:sha256:)?[0-9a-f]{6,64}\Z")
_SHORT = 12


@click.group(
    name="images",
    cls=LazyGroup,
    default="list",
    lazy={
        "build": Lazy(
            "_stock:build", "Build an image of debian, python or node from Debian's packages, without a registry."
        )
    },
)
def group() -> None:
    """Manage OCI images, which VMs are made from.

    Without a command, list them.
    """


@command(group, "get")
@click.argument("image")
async def get(session: Session, image: str) -> None:
    """Show an image, by a reference or the start of its digest."""
    show_one(session.out, await _find(session, image), _SHEET)


@command(group, "pull")
@click.argument("reference")
@click.option("--refresh", is_flag=True, help="Resolve the tag at the registry, even if the cache has it.")
@registry_options
async def pull(
    session: Session, reference: str, refresh: bool, authfile: Path | None, registry_secret: str | None
) -> int | None:
    """Fetch an image, so that VMs start from it at once."""
    auth = registry_auth(reference, authfile, registry_secret)
    request = PullImage(reference, refresh, registry_secret)

    async def fetch(streaming: Streaming) -> None:
        from ._pulls import showing_pull

        async with showing_pull(streaming.client, streaming.out, reference):
            image = await streaming.client.images.pull(request, registry_auth=auth)
        streaming.out.result(image, f"{safe(reference)} is {_short(image.digest)}, {size(image.size_bytes)}")

    return session.stream(fetch)


@command(group, "load")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("reference")
async def load(session: Session, file: Path, reference: str) -> int | None:
    """Upload the image in FILE, an archive made by `docker save`, to the daemon's cache as REFERENCE."""

    async def send(streaming: Streaming) -> None:
        from ._upload import send_file

        image = await send_file(streaming, file, partial(streaming.client.images.load, reference=reference))
        streaming.out.result(image, f"{safe(reference)} is {_short(image.digest)}, {size(image.size_bytes)}")

    return session.stream(send)


@command(group, "delete")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
async def delete(session: Session, images: tuple[str, ...]) -> None:
    """Delete images that no VM uses, by references or first digits of digests.

    If an image has several references, a reference is deleted, and the image with the last one.
    """
    for image in images:
        if _DIGEST.match(image):
            found = await session.client.images.get(image)
            await session.client.images.delete(found.digest)
        else:
            await session.client.images.prune(reference=image)
        if session.out.json:
            session.out.item({"image": image, "deleted": True})
        else:
            session.out.line(f"{safe(image)} is deleted")


def _show_pruned(out: Output, done: PrunedImages) -> None:
    if out.json:
        out.document(done)
        return
    if done.images:
        rows = [(_short(each.digest), ", ".join(each.references), size(each.own_bytes)) for each in done.images]
        out.table(("IMAGE", "REFERENCES", "OWN"), rows)
    out.line(f"{size(done.freed_bytes)} {'would be' if done.dry_run else 'are'} freed")


def _health_check(image: ImageView) -> str:
    """Returns a container's health check and its interval."""
    found = image.health_check
    if found is None:
        return ""
    command = " ".join(found.command) if found.shell else _words(found.command)
    return f"{command}, every {span(found.interval_s)}" if found.interval_s else command


async def _find(session: Session, image: str) -> ImageView:
    """Returns the image. :raises Failure: there is none."""
    if _DIGEST.match(image):
        return await session.client.images.get(image)
    found = await session.client.images.list(reference=image)
    if not found:
        raise Failure(f"the image {image!r} is not in the cache", hint=f"`volar images pull {image}` fetches it")
    return found[0]


def _first(references: Sequence[str]) -> str:
    """Returns the first reference, and the number of others."""
    more = f" and {len(references) - 1} more" if len(references) > 1 else ""
    return f"{references[0]}{more}" if references else ""


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:_SHORT]


def _words(words: tuple[str, ...]) -> str:
    import shlex

    return shlex.join(words)


_SHEET = Sheet(
    ("image", "reference", "size_bytes", "own_bytes", "created_at", "used_at", "used_by"),
    fields=(
        *("digest", "references", "platform", "size_bytes", "own_bytes", "layers", "created_at", "used_at", "used_by"),
        *("entrypoint", "command", "user", "workdir", "exposed_ports", "volumes", "health_check", "stop_signal"),
        *("env", "labels"),
    ),
    cells={
        "image": lambda image: _short(image.digest),
        "reference": lambda image: _first(image.references),
        "layers": lambda image: len(image.layers),
        "entrypoint": lambda image: _words(image.entrypoint),
        "command": lambda image: _words(image.command),
        "exposed_ports": lambda image: ", ".join(f"{each.port}/{each.protocol}" for each in image.exposed_ports),
        "health_check": _health_check,
    },
)
add_commands(
    group, "images", ImagesOperations, Shown({ImageView: _SHEET, PrunedImages: _show_pruned}), besides=["pulls"]
)
