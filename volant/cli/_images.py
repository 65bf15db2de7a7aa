"""`volar images`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from volant.client import ImagesOperations
from volant.model import ImageView, PullImage

from ._derived import add_commands
from ._image_options import registry_options
from ._lazy_group import Lazy, LazyGroup
from ._options import Size, listing
from ._registry_auth import registry_auth
from ._run import Duration, Failure, Session, command
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


@command(group, "list")
@listing
async def list_(session: Session) -> None:
    """List the OCI images in the daemon's cache."""
    images = await session.client.images.list()
    rows = (
        (
            _short(image.digest),
            _first(image.references),
            size(image.size_bytes),
            size(image.own_bytes),
            _ago(image.created_at),
            _ago(image.used_at),
            ", ".join(image.used_by),
        )
        for image in images
    )
    session.out.listing(images, ("IMAGE", "REFERENCES", "SIZE", "OWN", "CREATED", "USED", "USED BY"), rows)


@command(group, "get")
@click.argument("image")
async def get(session: Session, image: str) -> None:
    """Show an image, by a reference or the start of its digest."""
    found = await _find(session, image)
    session.out.facts(
        found,
        (
            ("digest", found.digest),
            ("references", ", ".join(found.references)),
            ("platform", found.platform),
            ("size", f"{size(found.size_bytes)}, {size(found.own_bytes)} of it its own, {len(found.layers)} layers"),
            ("created", found.created_at),
            ("used", found.used_at),
            ("used by", ", ".join(found.used_by)),
            ("entrypoint", _words(found.entrypoint)),
            ("command", _words(found.command)),
            ("user", found.user),
            ("workdir", found.workdir),
            ("ports", ", ".join(f"{each.port}/{each.protocol}" for each in found.exposed_ports)),
            ("volumes", ", ".join(found.volumes)),
            ("health check", _health_check(found)),
            ("stop signal", found.stop_signal),
            ("env", found.env),
            ("labels", found.labels),
        ),
    )


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


@command(group, "prune")
@click.option(
    "--max", "max_mb", type=Size(0), metavar="SIZE", help="Stop once all images together take up at most this: 20G."
)
@click.option("--unused-for", type=Duration(), help="Only images that were not used for this time: 12h.")
@click.option("--dry-run", is_flag=True, help="Show what would be deleted; delete nothing.")
async def prune(session: Session, max_mb: int | None, unused_for: float | None, dry_run: bool) -> None:
    """Delete all images that no VM and no snapshot uses, the least recently used first."""
    done = await session.client.images.prune(max_mb=max_mb, unused_for_s=unused_for, dry_run=dry_run)
    if session.out.json:
        session.out.document(done)
        return
    if done.images:
        rows = [(_short(each.digest), ", ".join(each.references), size(each.own_bytes)) for each in done.images]
        session.out.table(("IMAGE", "REFERENCES", "OWN"), rows)
    session.out.line(f"{size(done.freed_bytes)} {'would be' if dry_run else 'are'} freed")


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


def _ago(moment: datetime | None) -> str:
    if moment is None:
        return ""
    return f"{span((datetime.now(UTC) - moment).total_seconds())} ago"


def _words(words: tuple[str, ...]) -> str:
    import shlex

    return shlex.join(words)


add_commands(group, "images", ImagesOperations, besides=["pulls"])
