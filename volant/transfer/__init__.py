"""Moves snapshots from host to host.

`docs/explanation/snapshots.md` has the design. What moves are the chunks of `volant.chunks`. `OwnSnapshots` is the end
of a transfer that is this host; `Transfers` brings snapshots to registries and back, as OCI artifacts.
"""

from ._bases import BaseFiles, registries
from ._document import Bases, decode, encode
from ._own_snapshots import Incoming, Outgoing, OwnSnapshots
from ._transfer import Transfer, TransferError
from ._transfers import Client, Transfers, TransferSettings

__all__ = [
    "BaseFiles",
    "Bases",
    "Client",
    "Incoming",
    "Outgoing",
    "OwnSnapshots",
    "Transfer",
    "TransferError",
    "TransferSettings",
    "Transfers",
    "decode",
    "encode",
    "registries",
]
