"""What clients can do, apart from how they ask for it."""

from ._ask import ask_journal
from ._deps import ApiDeps, DaemonInfo, Health
from ._lookup import action_of, chosen, log_of, no_such_plugin, unreadable, vm_row
from ._networks import shown_network, shown_networks
from ._schema import Schema, describe, owners, standalone

__all__ = [
    "ApiDeps",
    "DaemonInfo",
    "Health",
    "Schema",
    "action_of",
    "ask_journal",
    "chosen",
    "describe",
    "log_of",
    "no_such_plugin",
    "owners",
    "shown_network",
    "shown_networks",
    "standalone",
    "unreadable",
    "vm_row",
]
