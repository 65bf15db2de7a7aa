"""The messages that the actor `templates` takes."""

from __future__ import annotations

import msgspec

from actors import Request
from volant.model import Problem, TemplateView

from ._key import TemplateSpec


class Wanted(msgspec.Struct, frozen=True):
    """A tell: a VM of this kind has booted cold, and the next one should not have to."""

    spec: TemplateSpec


class Suspect(msgspec.Struct, frozen=True):
    """A tell: a clone of that template has failed, and not for want of memory."""

    digest: str
    reason: str


class Build(Request[TemplateView], msgspec.Struct, frozen=True):
    """A client wants the template -> it, ready. A build that is under way is waited for.

    :raises Problem: 409 templates are off; 503 it can't be built, and why.
    """

    spec: TemplateSpec
    raises = (Problem,)


class GiveWay(Request[bool], msgspec.Struct, frozen=True):
    """A VM lacks memory -> whether a build was under way. It is given up, and tried again later."""


class ListTemplates(Request[tuple[TemplateView, ...]], msgspec.Struct, frozen=True):
    """All templates, those being built, and those that could not be built lately."""


class RemoveTemplate(Request[None], msgspec.Struct, frozen=True):
    """Removes a template. :raises Problem: 404; 503 its files can't be removed."""

    digest: str
    raises = (Problem,)
