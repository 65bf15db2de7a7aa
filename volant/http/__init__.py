"""From sockets to requests: connections and their limits, access control, and the middleware of every request."""

from ._access import Access as Access, for_ticket as for_ticket, without_credentials as without_credentials
from ._addresses import Network as Network, PortOrigin as PortOrigin, parse_network as parse_network
from ._body import (
    BODY_S as BODY_S,
    JSON as JSON,
    Nothing as Nothing,
    Upload as Upload,
    decode as decode,
    decode_body as decode_body,
    read_call_body as read_call_body,
    read_call_bytes as read_call_bytes,
    receive_into as receive_into,
)
from ._call import (
    NORMAL as NORMAL,
    Call as Call,
    Header as Header,
    Message as Message,
    Piece as Piece,
    has_etag as has_etag,
)
from ._caller_limits import CallerLimits as CallerLimits
from ._ending import (
    GOING_AWAY as GOING_AWAY,
    UNAUTHORIZED as UNAUTHORIZED,
    Ending as Ending,
    Stopping as Stopping,
    interruptible as interruptible,
)
from ._keys import (
    OF_ISSUER as OF_ISSUER,
    TICKET_S as TICKET_S,
    CodeRequest as CodeRequest,
    NamedKeys as NamedKeys,
    Tokens as Tokens,
)
from ._middleware import (
    Admission as Admission,
    Middleware as Middleware,
    Router as Router,
    StreamRoute as StreamRoute,
    first_problem as first_problem,
    internal_error as internal_error,
)
from ._problems import (
    new_request_id as new_request_id,
    not_json as not_json,
    problem_body as problem_body,
    too_large as too_large,
)
from ._project import (
    listed_project as listed_project,
    names_project as names_project,
    one_project as one_project,
    project_of_link as project_of_link,
    seen_project as seen_project,
)
from ._query import MAX_INTEGER as MAX_INTEGER, Query as Query, parse_time as parse_time
from ._serving import AsgiApp as AsgiApp, serve as serve
from ._sessions import NewSession as NewSession
from ._settings import ApiSettings as ApiSettings, Limits as Limits
from ._sign_ins import ATTEMPT_S as ATTEMPT_S
from ._subjects import Subject as Subject, parse_subject as parse_subject
from ._tls import (
    ClientCertificate as ClientCertificate,
    Credentials as Credentials,
    Tls as Tls,
    server_context as server_context,
)
