"""`volar run debian` on a host without access to a registry: offers the stock image of that name."""

from __future__ import annotations

import sys
from functools import partial

import click
import trio

from volant.model import Problem

from ._streaming import Session
from ._text import safe


async def stock_instead(session: Session, image: str, problem: Problem) -> str:
    """Returns the reference of the stock image that the user accepts instead of an image; builds it if necessary.

    Only a user at a terminal is asked: a script must not run an image other than the one it names.

    :param problem: why the image is not available
    :raises Problem: the same problem, if no stock image has that name or the user declines; if no user can be asked,
        with the command to build it as the hint
    :raises Failure: it can't be built
    """
    name = _stock_name(image)
    if name is None:
        raise problem
    found = [each for view in await session.client.images.list() for each in view.references]
    there = sorted(each for each in found if each.startswith(f"localhost/{name}:"))
    if session.out.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        how = f"`volar run {there[-1]}` runs" if there else f"`volar images build {name}` builds"
        problem.hint = f"{how} an image of {name} that needs no registry"
        raise problem
    session.out.note(safe(problem.detail))
    offer = f"Run {there[-1]}, which was built" if there else f"Build {name} from Debian's packages"
    ask = partial(click.confirm, f"{offer} on this host, instead?", default=True, err=True)
    if not await trio.to_thread.run_sync(ask, abandon_on_cancel=True):
        raise problem
    if there:
        return there[-1]
    from ._stock import built

    _, reference, _ = await built(session, name)
    return reference


def _stock_name(image: str) -> str | None:
    """Returns the name of the stock image that can replace an image with this reference."""
    from volant.images import STOCK
    from volant.oci import parse_reference

    reference = parse_reference(image)
    # The newest of the registry: who asks for a version wants that one.
    named = [name for name in STOCK if parse_reference(name) == reference]
    return named[0] if named else None
