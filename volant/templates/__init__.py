"""Templates: guests that have booted, for others to go on from."""

from ._actor import Templates
from ._ask import TemplateFailed
from ._builder import BuildDoors, Turns, template_tag_prefix
from ._recipe import Blueprint, Recipe, Told
from ._standby import Claim, Standby, StandbyLimits, Standbys, claim_in, standby_directory, standby_tag_prefix
from ._store import Found, Stored, TemplateStore, template_at, template_layer

__all__ = [
    "Blueprint",
    "BuildDoors",
    "Claim",
    "Found",
    "Recipe",
    "Standby",
    "StandbyLimits",
    "Standbys",
    "Stored",
    "TemplateFailed",
    "TemplateStore",
    "Templates",
    "Told",
    "Turns",
    "claim_in",
    "standby_directory",
    "standby_tag_prefix",
    "template_at",
    "template_layer",
    "template_tag_prefix",
]
