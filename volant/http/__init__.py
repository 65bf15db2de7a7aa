"""From sockets to requests: connections and their limits, access control, and the middleware of every request."""

from ._access import Access, for_ticket, without_credentials
from ._addresses import Network, PortOrigin, parse_network
from ._body import BODY_S, JSON, Nothing, Upload, decode, decode_body, read_call_body, read_call_bytes, receive_into
from ._call import NORMAL, Call, Header, Message, Piece, has_etag
from ._caller_limits import CallerLimits
from ._ending import GOING_AWAY, UNAUTHORIZED, Ending, Stopping, interruptible
from ._keys import OF_ISSUER, TICKET_S, CodeRequest, NamedKeys, Tokens
from ._middleware import Admission, Middleware, Router, StreamRoute, first_problem, internal_error
from ._problems import new_request_id, not_json, problem_body, too_large
from ._project import listed_project, names_project, one_project, project_of_link, seen_project
from ._query import MAX_INTEGER, Query, parse_time
from ._serving import AsgiApp, serve
from ._sessions import NewSession
from ._settings import ApiSettings, Limits
from ._sign_ins import ATTEMPT_S
from ._subjects import Subject, parse_subject
from ._tls import ClientCertificate, Credentials, Tls, server_context

__all__ = [
    "ATTEMPT_S",
    "BODY_S",
    "GOING_AWAY",
    "JSON",
    "MAX_INTEGER",
    "NORMAL",
    "OF_ISSUER",
    "TICKET_S",
    "UNAUTHORIZED",
    "Access",
    "Admission",
    "ApiSettings",
    "AsgiApp",
    "Call",
    "CallerLimits",
    "ClientCertificate",
    "CodeRequest",
    "Credentials",
    "Ending",
    "Header",
    "Limits",
    "Message",
    "Middleware",
    "NamedKeys",
    "Network",
    "NewSession",
    "Nothing",
    "Piece",
    "PortOrigin",
    "Query",
    "Router",
    "Stopping",
    "StreamRoute",
    "Subject",
    "Tls",
    "Tokens",
    "Upload",
    "decode",
    "decode_body",
    "first_problem",
    "for_ticket",
    "has_etag",
    "internal_error",
    "interruptible",
    "listed_project",
    "names_project",
    "new_request_id",
    "not_json",
    "one_project",
    "parse_network",
    "parse_subject",
    "parse_time",
    "problem_body",
    "project_of_link",
    "read_call_body",
    "read_call_bytes",
    "receive_into",
    "seen_project",
    "serve",
    "server_context",
    "too_large",
    "without_credentials",
]
