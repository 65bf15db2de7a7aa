"""Relays between clients and servers inside guests: HTTP, WebSockets and plain TCP, with a fair share for each VM."""

from ._headers import SANDBOX as SANDBOX, end_to_end as end_to_end
from ._redirect import GuestServer as GuestServer, OwnOrigin as OwnOrigin, unreachable as unreachable
from ._relay import (
    Relay as Relay,
    first_text as first_text,
    open_port as open_port,
    parse_port as parse_port,
    to_port as to_port,
)
