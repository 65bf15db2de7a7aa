"""From sockets to requests: connections and their limits, access control, and the middleware of every request."""

from ._access import Access, without_credentials
from ._body import (
    Nothing,
    Upload,
    decode,
    no_query,
    read_body,
    read_body_or,
    read_call_body,
    read_call_bytes,
    read_one_of,
    receive_into,
)
from ._call import GOING_AWAY, NORMAL, Call, Header, Message
from ._json import JSON, empty_response, json_response
from ._keys import TICKET_S
from ._limits import Limits
from ._middleware import Middleware, StreamRoute, first_problem, internal_error
from ._networks import Network, parse_network
from ._problems import new_request_id, not_json, problem_body, too_large
from ._query import MAX_INTEGER, Query, parse_time
from ._serving import serve
from ._settings import ApiSettings
from ._waits import interruptible

__all__ = [
    "GOING_AWAY",
    "JSON",
    "MAX_INTEGER",
    "NORMAL",
    "TICKET_S",
    "Access",
    "ApiSettings",
    "Call",
    "Header",
    "Limits",
    "Message",
    "Middleware",
    "Network",
    "Nothing",
    "Query",
    "StreamRoute",
    "Upload",
    "decode",
    "empty_response",
    "first_problem",
    "internal_error",
    "interruptible",
    "json_response",
    "new_request_id",
    "no_query",
    "not_json",
    "parse_network",
    "parse_time",
    "problem_body",
    "read_body",
    "read_body_or",
    "read_call_body",
    "read_call_bytes",
    "read_one_of",
    "receive_into",
    "serve",
    "too_large",
    "without_credentials",
]
