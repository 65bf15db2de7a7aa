"""Identifies callers by named API keys and by tokens of an OIDC issuer. See `docs/explanation/identity.md`."""

from ._claims import RoleRule, parse_role_rule
from ._named_keys import NamedKeys
from ._tokens import IssuerTokens, OidcSettings, oidc_obstacle

__all__ = ["IssuerTokens", "NamedKeys", "OidcSettings", "RoleRule", "oidc_obstacle", "parse_role_rule"]
