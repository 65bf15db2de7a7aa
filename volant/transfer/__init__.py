"""Moves snapshots from host to host.

`docs/explanation/snapshots.md` has the design. A transfer moves the chunks of `volant.chunks`. `OwnSnapshots` is this
host's end of a transfer; `Transfers` moves snapshots to and from registries, as OCI artifacts.
"""

from ._bases import BaseFiles as BaseFiles, registries as registries
from ._document import Bases as Bases, decode as decode, encode as encode
from ._own_snapshots import Incoming as Incoming, Outgoing as Outgoing, OwnSnapshots as OwnSnapshots
from ._transfer import Transfer as Transfer, TransferError as TransferError
from ._transfers import Client as Client, Transfers as Transfers, TransferSettings as TransferSettings
