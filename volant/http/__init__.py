"""From sockets to requests: connections and their limits, access control, and the middleware of every request."""

from ._access import Access, without_credentials
from ._body import BODY_S, JSON, Nothing, Upload, decode, decode_body, read_call_body, read_call_bytes, receive_into
from ._call import GOING_AWAY, NORMAL, Call, Header, Message, Piece
from ._keys import TICKET_S
from ._limits import Limits
from ._middleware import Middleware, StreamRoute, first_problem, internal_error
from ._networks import Network, parse_network
from ._problems import new_request_id, not_json, problem_body, too_large
from ._query import MAX_INTEGER, Query, parse_time
from ._serving import AsgiApp, serve
from ._settings import ApiSettings
from ._waits import interruptible

__all__ = [
    "BODY_S",
    "GOING_AWAY",
    "JSON",
    "MAX_INTEGER",
    "NORMAL",
    "TICKET_S",
    "Access",
    "ApiSettings",
    "AsgiApp",
    "Call",
    "Header",
    "Limits",
    "Message",
    "Middleware",
    "Network",
    "Nothing",
    "Piece",
    "Query",
    "StreamRoute",
    "Upload",
    "decode",
    "decode_body",
    "first_problem",
    "internal_error",
    "interruptible",
    "new_request_id",
    "not_json",
    "parse_network",
    "parse_time",
    "problem_body",
    "read_call_body",
    "read_call_bytes",
    "receive_into",
    "serve",
    "too_large",
    "without_credentials",
]
