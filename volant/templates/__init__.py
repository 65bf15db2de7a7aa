"""Templates: booted guests from which VMs are cloned."""

from ._actor import Templates as Templates
from ._builder import TemplateBuilder as TemplateBuilder, template_tag_prefix as template_tag_prefix
from ._demand import WarmPoolLimits as WarmPoolLimits
from ._guest import TemplateFailed as TemplateFailed
from ._key import GuestConfig as GuestConfig, TemplateKey as TemplateKey, TemplateSpec as TemplateSpec
from ._store import (
    ReadyTemplate as ReadyTemplate,
    TemplateRecord as TemplateRecord,
    TemplateStore as TemplateStore,
    template_at as template_at,
    template_layer as template_layer,
)
from ._warm_pool import (
    Claim as Claim,
    WarmPool as WarmPool,
    WarmProcess as WarmProcess,
    claim_in as claim_in,
    standby_directory as standby_directory,
    standby_tag_prefix as standby_tag_prefix,
)
