"""Identifies callers by named API keys and by tokens of an OIDC issuer. See `docs/explanation/identity.md`."""

from ._claims import RoleRule as RoleRule, parse_role_rule as parse_role_rule
from ._named_keys import NamedKeys as NamedKeys
from ._tokens import IssuerTokens as IssuerTokens, OidcSettings as OidcSettings, oidc_obstacle as oidc_obstacle
