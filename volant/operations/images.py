"""OCI images: fetch, list and remove them. `docs/explanation/oci.md` explains their storage."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated

from volant.model import ImageReference, ImageView, Permission, Problem, PrunedImages, PullImage, PullView

from ._context import Context
from ._images import admit_image, image_problems, image_view, pull_view, registry_auth
from ._lookup import require_project
from ._parameters import Flag, Integer, Parameter, Seconds, Text
from ._table import OCTETS, TABLE, Answer, Tool

if TYPE_CHECKING:
    from volant.oci import CachedImage

_IMAGE = "/api/v1/images/{digest}"
_MAX_MB = 2**40
_PULL_S = 3600.0


@TABLE.operation(
    "GET /api/v1/images",
    permission=Permission.VIEW,
    answer="The images, most recently used first",
    errors=(503,),
    tool=Tool(
        "images_list",
        "List images",
        "List the OCI images in the cache of this host, from which VMs start without a fetch.",
    ),
)
async def list_images(
    context: Context,
    *,
    reference: Annotated[
        str | None, Text(help="Only the image that this reference last resolved to", of=ImageReference)
    ] = None,
) -> list[ImageView]:
    """List the OCI images in the cache."""
    oci = context.deps.oci
    with image_problems("reference"):
        if reference is None:
            images = await oci.all(context.seen)
        else:
            found = await oci.get(reference, context.project)
            images = [] if found is None else [found]
    users, project = oci.users(), context.seen
    return [image_view(image, users, project) for image in sorted(images, key=lambda image: -image.used_at)]


@TABLE.operation(
    "GET /api/v1/images/pulls", permission=Permission.VIEW, answer="The running fetches", client="images.pulls"
)
async def list_pulls(context: Context) -> list[PullView]:
    """List the fetches of OCI images that are under way."""
    project = context.seen
    return [pull_view(pull) for pull in context.deps.oci.pulls() if project in (None, pull.project)]


@TABLE.operation(
    "POST /api/v1/images/pull",
    permission=Permission.CONTROL,
    answer="The image in the cache",
    errors=(403, 404, 422, 503, 507),
    registry_auth=True,
    tool=Tool(
        "images_pull",
        "Fetch an image",
        "Fetch an OCI image from its registry, so that VMs start from it at once. It may take minutes. If the call is "
        "interrupted, call it again: it waits for the same fetch.",
        idempotent=True,
    ),
    client_timeout_s=_PULL_S,
    examples={"A tag": {"reference": "nginx:1.29"}},
)
async def pull_image(context: Context, *, body: PullImage) -> ImageView:
    """Fetch an OCI image, and wait until it is in the cache.

    The registry is not asked about a tag that the cache knows, unless `refresh` is set. If the client disconnects, the
    fetch continues for 10 minutes, and another request for the same image waits for it.
    """
    oci, project = context.deps.oci, context.project
    require_project(context.deps, project)
    await admit_image(context, body.reference)
    auth = await registry_auth(context, body.registry_secret)
    is_admin = context.caller.may(Permission.ADMIN)
    pull = partial(oci.pull, body.reference, project, auth=auth, refresh=body.refresh, is_admin=is_admin)
    with image_problems("reference"):
        image = await context.unless_stopping(pull)
        # With the references that it has now.
        found = await oci.find(image.digest, project) or image
    return image_view(found, oci.users(), project)


@TABLE.operation(
    "POST /api/v1/images/prune",
    permission=Permission.ADMIN,
    answer="The removed images; with `dry_run`, the images that would be removed",
    errors=(404, 409, 503),
    client_timeout_s=330,
)
async def prune_images(
    context: Context,
    *,
    reference: Annotated[
        str | None,
        Text(help="Only this reference, and its image unless something else needs it", of=ImageReference),
    ] = None,
    max_mb: Annotated[
        int,
        Integer(help="Stop once all images together take up at most this; default 0", minimum=0, maximum=_MAX_MB),
    ] = 0,
    unused_for_s: Annotated[
        float,
        Seconds(name="unused_for", help="Only images that were not used for this time: `12h`", maximum=math.inf),
    ] = 0.0,
    dry_run: Annotated[bool, Flag(help="Report what would be removed, without removing it")] = False,
) -> PrunedImages:
    """Remove OCI images that no VM and no snapshot uses, the least recently used first."""
    oci = context.deps.oci
    with image_problems("reference"):
        if reference is not None:
            return await _forget(context, reference, dry_run=dry_run)
        gone, freed = await oci.prune(max_mb * 2**20, unused_for_s=unused_for_s, dry_run=dry_run)
    users = oci.users()
    shown = tuple(image_view(image, users, None) for image in gone)
    return PrunedImages(dry_run=dry_run, images=shown, references=(), freed_bytes=freed)


async def _forget(context: Context, reference: str, *, dry_run: bool) -> PrunedImages:
    oci = context.deps.oci
    project = context.project
    image = await oci.get(reference, project)
    if image is None:
        raise _no_such_image(f"{reference!r} is not in the cache", "reference")
    users = oci.users()
    if len(image.names) > 1 or users.get(image.digest):
        if not dry_run:
            await oci.remove_name(reference, project)
        return PrunedImages(dry_run=dry_run, images=(), references=(reference,), freed_bytes=0)
    if not dry_run and not await oci.forget(image.digest, project):
        return PrunedImages(dry_run=False, images=(), references=(reference,), freed_bytes=0)
    shown = (image_view(image, users, project),)
    return PrunedImages(dry_run=dry_run, images=shown, references=(), freed_bytes=image.own_bytes)


@TABLE.operation(f"GET {_IMAGE}", permission=Permission.VIEW, answer="The image", errors=(404, 503))
async def get_image(context: Context, digest: str) -> ImageView:
    """Get an OCI image, by its digest or at least 6 digits of it."""
    return image_view(await _find(context, digest), context.deps.oci.users(), context.seen)


@TABLE.operation(
    f"DELETE {_IMAGE}",
    permission=Permission.CONTROL,
    answer="The image and its references are deleted",
    errors=(404, 409, 503),
)
async def delete_image(context: Context, digest: str) -> None:
    """Delete an OCI image that no VM and no snapshot uses.

    If the request is for a project, other projects keep the image.
    """
    image, project = await _find(context, digest), context.seen
    with image_problems():
        if project is None:
            await context.deps.oci.remove(image.digest)
        else:
            await context.deps.oci.forget(image.digest, project)


async def _find(context: Context, digest: str) -> CachedImage:
    with image_problems("digest"):
        found = await context.deps.oci.find(digest, context.seen)
    if found is None:
        raise _no_such_image(f"there is no image {digest[:80]!r} in the cache")
    return found


def _no_such_image(detail: str, field: str | None = None) -> Problem:
    return Problem(404, "image-not-found", detail, field=field, hint="`volar images list` shows what there is")


TABLE.declare(
    "PUT /api/v1/images/archive",
    "put_image",
    Permission.CONTROL,
    "Upload an OCI image as an archive",
    answers={201: Answer("The image in the cache", ImageView)},
    body=bytes,
    body_media=OCTETS,
    documented=(Parameter("reference", ImageReference, "The reference for the image, with a tag: `team/app:1.2`"),),
    errors=(404, 408, 422, 503, 507),
    details="The body is an archive with one image, made by `docker save`, `podman save` or `skopeo copy … "
    "oci-archive:FILE`. The maximum size is `oci_max_mb`. More than four uploads at a time get 503. The reference may "
    "be that of a registry, and then replaces the registry's image until it is pulled with `refresh`.",
)
