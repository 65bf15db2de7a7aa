"""The messages of the actor `templates`."""

from __future__ import annotations

import msgspec

from actors import Request
from volant.model import Problem, TemplateView

from ._key import TemplateSpec


class Wanted(msgspec.Struct, frozen=True):
    """A tell: such a VM has booted cold, and the next one should not have to."""

    spec: TemplateSpec


class Suspect(msgspec.Struct, frozen=True):
    """A tell: a clone of that template has failed, and not for lack of memory."""

    digest: str
    reason: str


class Build(Request[TemplateView], msgspec.Struct, frozen=True):
    """A client wants the template -> the ready template. Waits for a running build.

    :raises Problem: 409, templates are off; 503, it can't be built.
    """

    spec: TemplateSpec
    raises = (Problem,)


class GiveWay(Request[bool], msgspec.Struct, frozen=True):
    """A VM lacks memory -> whether a build was running. The build is aborted, and retried later."""


class ListTemplates(Request[tuple[TemplateView, ...]], msgspec.Struct, frozen=True):
    """All templates, including those that are being built or recently failed."""


class RemoveTemplate(Request[None], msgspec.Struct, frozen=True):
    """Removes a template. :raises Problem: 404; 503, its files can't be removed."""

    digest: str
    raises = (Problem,)
