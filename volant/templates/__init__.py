"""Templates: guests that have booted, for others to go on from."""

from ._actor import Templates
from ._builder import BuildDoors, TemplateFailed, Turns, template_mark_prefix
from ._recipe import Blueprint, Recipe, Told
from ._store import Found, Stored, TemplateStore, template_at

__all__ = [
    "Blueprint",
    "BuildDoors",
    "Found",
    "Recipe",
    "Stored",
    "TemplateFailed",
    "TemplateStore",
    "Templates",
    "Told",
    "Turns",
    "template_at",
    "template_mark_prefix",
]
