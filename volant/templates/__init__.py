"""Templates: guests that have booted, for others to go on from."""

from ._actor import Templates
from ._ask import TemplateFailed
from ._builder import BuildDoors, Turns, template_tag_prefix
from ._key import GuestConfig, TemplateKey, TemplateSpec
from ._standby import Claim, Standby, StandbyLimits, Standbys, claim_in, standby_directory, standby_tag_prefix
from ._store import ReadyTemplate, TemplateRecord, TemplateStore, template_at, template_layer

__all__ = [
    "BuildDoors",
    "Claim",
    "GuestConfig",
    "ReadyTemplate",
    "Standby",
    "StandbyLimits",
    "Standbys",
    "TemplateFailed",
    "TemplateKey",
    "TemplateRecord",
    "TemplateSpec",
    "TemplateStore",
    "Templates",
    "Turns",
    "claim_in",
    "standby_directory",
    "standby_tag_prefix",
    "template_at",
    "template_layer",
    "template_tag_prefix",
]
