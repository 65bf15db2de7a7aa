"""From sockets to requests: connections and their bounds, who may ask, and what every request passes."""

from ._access import Access, without_credentials
from ._call import GOING_AWAY, NORMAL, Call, Header, Message
from ._edge import Edge, StreamRoute, first_problem, internal_error
from ._keys import TICKET_S
from ._limits import Limits
from ._networks import Network, parse_network
from ._problems import new_request_id, problem_body, too_large
from ._query import MAX_INTEGER, Query, parse_time
from ._serving import serve
from ._settings import ApiSettings
from ._waits import interruptible

__all__ = [
    "GOING_AWAY",
    "MAX_INTEGER",
    "NORMAL",
    "TICKET_S",
    "Access",
    "ApiSettings",
    "Call",
    "Edge",
    "Header",
    "Limits",
    "Message",
    "Network",
    "Query",
    "StreamRoute",
    "first_problem",
    "internal_error",
    "interruptible",
    "new_request_id",
    "parse_network",
    "parse_time",
    "problem_body",
    "serve",
    "too_large",
    "without_credentials",
]
