"""Templates: guests that have booted, for others to go on from."""

from ._actor import Templates
from ._ask import TemplateFailed
from ._builder import BootSlots, BuildDoors, template_tag_prefix
from ._key import GuestConfig, TemplateKey, TemplateSpec
from ._store import ReadyTemplate, TemplateRecord, TemplateStore, template_at, template_layer
from ._warm_pool import Claim, WarmPool, WarmPoolLimits, WarmProcess, claim_in, standby_directory, standby_tag_prefix

__all__ = [
    "BootSlots",
    "BuildDoors",
    "Claim",
    "GuestConfig",
    "ReadyTemplate",
    "TemplateFailed",
    "TemplateKey",
    "TemplateRecord",
    "TemplateSpec",
    "TemplateStore",
    "Templates",
    "WarmPool",
    "WarmPoolLimits",
    "WarmProcess",
    "claim_in",
    "standby_directory",
    "standby_tag_prefix",
    "template_at",
    "template_layer",
    "template_tag_prefix",
]
