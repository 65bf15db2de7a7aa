"""Requests to the daemon, independent of the HTTP library: answers, errors, and retries."""

from __future__ import annotations

import os
import re
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar
from uuid import uuid4

import msgspec

from volant import __version__
from volant.model import Problem, invalid, is_name

from ._address import Address
from ._errors import ClientProblem, ConnectionLost, DeadlineExceeded, UnexpectedAnswer, Unreachable
from ._tls import Tls

T = TypeVar("T")

Query = Mapping[str, str | int | Sequence[str] | None]
"""Parameters of a query. A parameter that is None is left out; a sequence repeats it."""

_KEY = re.compile(r"[\x21-\x7e]{1,1000}\Z")
_ONCE = re.compile(r"[\x21-\x7e]{1,255}\Z")

CONNECT_S = 5.0
ANSWER_S = 30.0
MAX_BODY = 64 * 1024 * 1024
MAX_ERROR_BODY = 1024 * 1024
_AGAIN_S = 20.0
_AGAIN_PAUSE_S = 0.25
_KEY_HEADER = "X-Volant-API-Key"
TRUSTED_UIDS = "VOLANT_TRUSTED_UIDS"
"""The variable with users of this host whose daemons also receive a key, besides root and the client's user:
`1001,1002` or `all`."""


class Request(msgspec.Struct, frozen=True):
    """A request to the daemon. Any answer is an error unless it is a success or its status is in `also`."""

    method: str
    path: str
    query: Query | None = None
    body: object = None
    """The body, sent as JSON; None for no body."""
    headers: Mapping[str, str] = {}
    also: Collection[int] = ()


class Answer(msgspec.Struct, frozen=True):
    """A complete answer."""

    request: str
    """Method and path of the request."""
    status: int
    headers: Mapping[str, str]
    """Headers by name in lower case; values of a repeated header are joined with commas."""
    content: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.content.decode(errors="replace")


class _Socket(Protocol):
    """A socket of the library or of Trio."""

    @property
    def family(self) -> int: ...
    def getsockname(self) -> Any: ...
    def getpeername(self) -> Any: ...


class Transport(ABC):
    """Sends requests to one daemon.

    :raises ValueError: `api_key`, `project` or `host` is malformed, or a file of `tls` can't be used; the text does not
        contain the key.
    """

    def __init__(
        self,
        address: Address,
        api_key: str | None,
        tls: Tls | None = None,
        project: str | None = None,
        host: str | None = None,
    ) -> None:
        self.address = address
        self.tls_options = tls or Tls()
        self.headers = {"User-Agent": f"volant-client/{__version__}"}
        if api_key is not None:
            if not _KEY.match(api_key):
                raise ValueError("the API key is not 1 to 1000 characters of visible ASCII without spaces")
            self.headers[_KEY_HEADER] = api_key
        if project is not None:
            if project != "*" and not is_name(project):
                raise ValueError(f"{project[:80]!r} is not the name of a project")
            self.headers["Volant-Project"] = project
        if host is not None:
            if not is_name(host):
                raise ValueError(f"{host[:80]!r} is not the name of a host")
            self.headers["Volant-Host"] = host

    def check_server(self, connection: _Socket) -> None:
        """Checks which user would receive the key over a new connection on loopback: while the daemon is down, any user
        of this host can listen there.

        :raises Unreachable: the user is neither root, nor the client's own, nor in `TRUSTED_UIDS`.
        """
        trusted = os.environ.get(TRUSTED_UIDS, "")
        if self.address.tls or _KEY_HEADER not in self.headers or sys.platform != "linux" or trusted == "all":
            return
        from volant.model.addresses import is_loopback, server_of

        try:
            here, there = connection.getsockname()[:2], connection.getpeername()[:2]
        except OSError:
            return  # A Unix socket has no such addresses, and a connection that broke already takes no key.
        if connection.family == socket.AF_UNIX or not is_loopback(there[0]):
            return
        try:
            uid = server_of(here, there)
        except (OSError, ValueError):
            uid = None
        if uid not in (0, os.geteuid()) and str(uid) not in trusted.replace(",", " ").split():
            raise Unreachable(
                f"{self.address.text} is served by {'an unknown user' if uid is None else f'user {uid}'} of this host, "
                "who would get the API key",
                hint=f"if that is the daemon's user, set {TRUSTED_UIDS}={'all' if uid is None else uid}; otherwise "
                "start the daemon, and find out who listens in its place",
            )

    @abstractmethod
    async def send(self, request: Request, *, timeout_s: float = ANSWER_S) -> Answer:
        """Sends one request and returns its whole answer.

        :param timeout_s: for all of it, in seconds
        :raises ClientProblem: the daemon answered with an error.
        :raises ClientError: there is no answer, or one that is too long.
        """

    @abstractmethod
    def _now(self) -> float:
        """Returns the time on a monotonic clock, in seconds."""

    @abstractmethod
    async def _sleep(self, seconds: float) -> None:
        """Waits for this time."""

    async def get(self, path: str, kind: type[T], query: Query | None = None) -> T:
        """Sends a `GET` and returns its answer, decoded."""
        return decode(await self.send(Request("GET", path, query)), kind)

    async def once(
        self,
        path: str,
        *,
        key: str | None,
        query: Query | None = None,
        body: object = None,
        headers: Mapping[str, str] = {},
        timeout_s: float = ANSWER_S,
    ) -> Answer:
        """Sends a `POST` that is executed once, even if it must be sent several times.

        If the connection breaks before the answer is complete, the request is sent again with the same
        `Idempotency-Key`, for 20 s: a daemon that was restarted in between returns the stored response. If the daemon
        can't be reached at the first attempt, there is no retry.

        :param key: the idempotency key, so that the caller can repeat the request later; None for a new one
        :raises Problem: 400, `key` is malformed.
        :raises ClientProblem: the daemon answered with an error.
        :raises ClientError: there is no answer; with `ConnectionLost` the request may have been executed.
        """
        if key is not None and not _ONCE.match(key):
            raise invalid("idempotency_key", "the idempotency key is not 1 to 255 visible ASCII characters, no spaces")
        headers = {**headers, "Idempotency-Key": key if key is not None else uuid4().hex}
        request = Request("POST", path, query, body, headers)
        lost: ConnectionLost | None = None
        give_up_at = float("inf")
        while True:
            try:
                return await self.send(request, timeout_s=timeout_s)
            except ConnectionLost as error:
                if lost is None:
                    give_up_at = self._now() + _AGAIN_S
                lost = error
            except Unreachable:
                if lost is None:
                    raise
            except ClientProblem as problem:
                # The daemon may still be handling the request of the lost connection.
                if lost is None or problem.code != "idempotency-key-in-use":
                    raise
            if self._now() + _AGAIN_PAUSE_S > give_up_at:
                raise lost
            await self._sleep(_AGAIN_PAUSE_S)

    def too_slow(self, timeout_s: float) -> DeadlineExceeded:
        """Returns the error for an answer that took longer than `timeout_s`."""
        return DeadlineExceeded(
            f"{self.address.text} did not answer within {timeout_s:g} s", hint="the request may still be carried out"
        )

    def too_long(self, maximum: int) -> UnexpectedAnswer:
        """Returns the error for an answer that is longer than `maximum` bytes."""
        return UnexpectedAnswer(f"the answer of {self.address.text} is longer than {maximum} bytes")

    def lost(self, reason: str) -> ConnectionLost | Unreachable:
        """Returns the error for a lost connection."""
        if " alert " in reason and self.address.tls:
            # With TLS 1.3 a client believes that it is connected before the daemon has seen its certificate.
            return self.address.unreachable(reason)
        return ConnectionLost(f"the connection to {self.address.text} broke: {reason}")


class Operations:
    """A group of methods that are requests over one transport."""

    waits_for: ClassVar[Mapping[str, str]] = {}
    """The status that a VM reaches after a method of that name."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport


@contextmanager
def encoding() -> Iterator[None]:
    """Converts encoding errors in the block. An argument of a command line may be any bytes, which Python represents as
    surrogates.

    :raises Problem: 400, a text can't be sent
    """
    try:
        yield
    except UnicodeEncodeError as error:
        raise Problem(
            400, "invalid-request", f"{error.object[:80]!r} is not Unicode", hint="write it in UTF-8"
        ) from None


def decode(answer: Answer, kind: type[T]) -> T:
    """Returns the body of an answer as `kind`. :raises UnexpectedAnswer: it is malformed."""
    return decode_json(answer.content, kind, f"the answer to {answer.request}")


def decode_json(data: bytes | str, kind: type[T], what: str) -> T:
    """Returns `data` as `kind`. :raises UnexpectedAnswer: it is not JSON, or has other types."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UnexpectedAnswer(
            f"{what} can't be decoded: {error}",
            hint="is this a volantd, and of about the same version as this client?",
        ) from error


class _WireProblem(msgspec.Struct):
    type: str = ""
    title: str = ""
    detail: str = ""
    request_id: str | None = None
    vm: str | None = None
    field: str | None = None
    hint: str | None = None


def problem(status: int, headers: Mapping[str, str], body: bytes) -> ClientProblem:
    """Returns the exception for an error response of the daemon or of a proxy."""
    request_id = headers.get("x-request-id")
    try:
        wire = msgspec.json.decode(body, type=_WireProblem)
    except (ValueError, RecursionError):
        if status == 400 and body.startswith(b"This port expects TLS"):
            return ClientProblem(
                status, "tls-required", "the daemon expects TLS", hint="write https:// in its address"
            )  # fmt: skip
        return ClientProblem(
            status,
            "unexpected-answer",
            f"the answer is HTTP status {status} without an explanation",
            hint="is this a volantd, or a proxy before one?",
            request_id=request_id,
        )
    return ClientProblem(
        status,
        wire.type.rstrip("/").rpartition("/")[2].rpartition(":")[2] or "problem",
        wire.detail or wire.title or f"HTTP status {status}",
        field=wire.field,
        hint=wire.hint,
        vm=wire.vm,
        request_id=wire.request_id or request_id,
    )
