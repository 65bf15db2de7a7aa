"""The messages that the actor `templates` takes."""

from __future__ import annotations

from dataclasses import dataclass

from actors import Request
from volant.model import Problem, TemplateView

from ._key import TemplateSpec


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tell: a VM of this kind has booted cold, and the next one should not have to."""

    spec: TemplateSpec


@dataclass(frozen=True, slots=True)
class Suspect:
    """A tell: a clone of that template has failed, and not for want of memory."""

    digest: str
    reason: str


@dataclass(frozen=True, slots=True)
class Build(Request[TemplateView]):
    """A client wants the template -> it, ready. A build that is under way is waited for.

    :raises Problem: 409 templates are off; 503 it can't be built, and why.
    """

    spec: TemplateSpec
    raises = (Problem,)


@dataclass(frozen=True, slots=True)
class GiveWay(Request[bool]):
    """A VM lacks memory -> whether a build was under way. It is given up, and tried again later."""


@dataclass(frozen=True, slots=True)
class ListTemplates(Request[tuple[TemplateView, ...]]):
    """All templates, those being built, and those that could not be built lately."""


@dataclass(frozen=True, slots=True)
class RemoveTemplate(Request[None]):
    """Removes a template. :raises Problem: 404; 503 its files can't be removed."""

    digest: str
    raises = (Problem,)
