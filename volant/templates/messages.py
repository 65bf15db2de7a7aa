"""What can be asked of, and told to, the actor that keeps the templates."""

from __future__ import annotations

from dataclasses import dataclass

from actors import Request
from volant.model import Problem, TemplateView

from ._key import TemplateSpec


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tell: a VM of this kind has booted cold, and the next ones should not have to."""

    spec: TemplateSpec


@dataclass(frozen=True, slots=True)
class Suspect:
    """A tell: a clone of that template has failed, and not for want of memory."""

    digest: str
    reason: str


@dataclass(frozen=True, slots=True)
class Build(Request[TemplateView]):
    """Somebody wants the template -> it, ready. One that is there is that; one that is being built is waited for.

    :raises Problem: 409 there are no templates here; 503 it can't be had, and why.
    """

    spec: TemplateSpec
    raises = (Problem,)


@dataclass(frozen=True, slots=True)
class GiveWay(Request[bool]):
    """A VM lacks memory -> whether a build was under way that had some of it. It is given up, and tried again later."""


@dataclass(frozen=True, slots=True)
class ListTemplates(Request[tuple[TemplateView, ...]]):
    """All that are there, are being made, or could not be made lately."""


@dataclass(frozen=True, slots=True)
class RemoveTemplate(Request[None]):
    """Take one away. :raises Problem: 404; 503 the disk does not take it."""

    digest: str
    raises = (Problem,)
