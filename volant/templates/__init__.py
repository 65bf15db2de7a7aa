"""Templates: guests that have booted, for VMs to go on from."""

from ._actor import Templates
from ._builder import TemplateBuilder, template_tag_prefix
from ._demand import WarmPoolLimits
from ._guest import TemplateFailed
from ._key import GuestConfig, TemplateKey, TemplateSpec
from ._store import ReadyTemplate, TemplateRecord, TemplateStore, template_at, template_layer
from ._warm_pool import Claim, WarmPool, WarmProcess, claim_in, standby_directory, standby_tag_prefix

__all__ = [
    "Claim",
    "GuestConfig",
    "ReadyTemplate",
    "TemplateBuilder",
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
