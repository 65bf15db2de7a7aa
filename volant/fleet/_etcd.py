"""A client of etcd through its JSON gateway: reads, transactions, leases, watches."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio

from ._gateway import (
    MAX_ANSWER,
    Failure,
    Granted,
    KeptAlive,
    Ranged,
    SignedIn,
    Transacted,
    condition,
    operation,
    range_of,
)
from ._interface import (
    Compacted,
    Compare,
    Entry,
    EtcdError,
    EtcdRefused,
    EtcdUnavailable,
    Lease,
    LeaseGone,
    OutcomeUnknown,
    Step,
    Transaction,
)
from ._watch import Watch, watching

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

_CONNECT_S = 2.0
_PAGE = 500
MAX_KEYS = 200_000
"""Maximum keys of one list: a fleet has some keys for each VM. Without a limit, a faulty etcd could fill the memory."""
_HEADERS = {"Grpc-Metadata-hasleader": "true", "Accept-Encoding": "identity"}
"""With the first header, a member without a quorum answers at once, and ends watches. Without it, a watch hangs
silently, and a change fails after 7 s with an unknown outcome."""

_UNAVAILABLE = 14
_UNAUTHENTICATED = 16
_NOT_FOUND = 5
_OUT_OF_RANGE = 11
_UNCHANGED = ("etcdserver: no leader", "etcdserver: too many requests", "etcdserver: rpc not supported for learner")
"""With these texts of code 14, nothing was changed. Other texts are for requests that were proposed."""


class EtcdSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings for etcd."""

    endpoints: tuple[str, ...]
    """The `https://host:2379` of each member."""
    user: str = ""
    password: str = ""
    """The password, if etcd has users. Without users, the certificates of both sides decide."""
    context: ssl.SSLContext | None = None
    """The context with etcd's CA and the client's certificate; None for plain HTTP."""

    def __repr__(self) -> str:
        """Returns the settings without the password, for logs and tracebacks."""
        return f"EtcdSettings(endpoints={self.endpoints!r}, user={self.user!r})"


class Etcd:
    """Sends requests to one member, and to the others if it does not answer.

    Each call has a deadline and a result that shows whether it may have changed something: `EtcdUnavailable` and
    `EtcdRefused` have not, `OutcomeUnknown` may have. A request that may have succeeded is not repeated.
    """

    def __init__(self, http: httpx.AsyncClient, settings: EtcdSettings, *, deadline_s: float = 10.0) -> None:
        self._http = http
        self._settings = settings
        self._deadline_s = deadline_s
        self._endpoints = [each.rstrip("/") for each in settings.endpoints]
        self._token = ""

    async def aclose(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    # Reads

    async def get(self, key: str) -> Entry | None:
        """Returns a key as the quorum has it now; None if it does not exist. :raises EtcdUnavailable, EtcdRefused:"""
        entries, _, _ = await self._read("/v3/kv/range", {"key": _key(key)}, _page)
        return entries[0] if entries else None

    async def list(self, prefix: str) -> tuple[Sequence[Entry], int]:
        """Returns all keys with a prefix at one revision, and that revision.

        :raises EtcdUnavailable, EtcdRefused: :raises Compacted: it took too long; list again.
        """
        entries: list[Entry] = []
        revision = 0
        after, limit = "", _PAGE
        while True:
            body = {**range_of(prefix, after=after), "limit": str(limit), "revision": str(revision)}
            try:
                page, newest, more = await self._read("/v3/kv/range", body, _page)
            except EtcdUnavailable as error:
                if limit == 1 or not isinstance(error.__cause__, _TooLarge):
                    raise
                limit = max(1, limit // 4)
                continue
            revision = revision or newest
            entries += page
            if len(entries) > MAX_KEYS:
                raise EtcdRefused(f"more than {MAX_KEYS} keys of etcd begin with {prefix!r}")
            if not more or not page:
                return entries, revision
            after = entries[-1].key

    # Changes

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        """Executes all `steps` if all conditions hold, otherwise all of `otherwise`, atomically.

        :raises EtcdUnavailable, EtcdRefused: nothing was changed.
        :raises OutcomeUnknown: read again before you decide.
        """
        body = {
            "compare": [condition(each) for each in conditions],
            "success": [operation(each) for each in steps],
            "failure": [operation(each) for each in otherwise],
        }
        return await self._change("/v3/kv/txn", body, _transaction)

    async def grant(self, ttl_s: int) -> Lease:
        """Returns a new lease. :raises EtcdUnavailable, EtcdRefused, OutcomeUnknown: a lease may have been granted,
        which expires."""
        return await self._change("/v3/lease/grant", {"TTL": str(ttl_s), "ID": "0"}, _lease)

    async def keep_alive(self, lease: int) -> float:
        """Extends a lease; returns its TTL in seconds, which counts from etcd's receipt of the request.

        :raises LeaseGone: it has ended. :raises EtcdUnavailable, EtcdRefused, OutcomeUnknown:
        """
        # One request for each beat: etcd ignores further ones in a stream.
        ttl_s = await self._change("/v3/lease/keepalive", {"ID": str(lease)}, _ttl_s)
        # A lease that has ended is answered with 200, and without a TTL.
        if ttl_s <= 0:
            raise LeaseGone(f"the lease {lease:x} has ended")
        return ttl_s

    async def revoke(self, lease: int) -> None:
        """Ends a lease and deletes its keys; an ended lease is no error.

        :raises EtcdUnavailable, EtcdRefused, OutcomeUnknown:
        """
        try:
            await self._change("/v3/lease/revoke", {"ID": str(lease)}, lambda content: None)
        except LeaseGone:
            pass

    # Requests

    async def _read(self, path: str, body: dict[str, Any], parse: Callable[[bytes], T]) -> T:
        try:
            return await self._ask(path, body, parse)
        except OutcomeUnknown as error:
            raise EtcdUnavailable(str(error)) from error

    async def _change(self, path: str, body: dict[str, Any], parse: Callable[[bytes], T]) -> T:
        return await self._ask(path, body, parse, changes=True)

    async def _ask(self, path: str, body: dict[str, Any], parse: Callable[[bytes], T], *, changes: bool = False) -> T:
        """Asks the members one after the other, until one answers or the request may have been executed.

        :param parse: parses the body of an answer; :raises ValueError: it is malformed
        """
        data = msgspec.json.encode(body)
        failure: EtcdError = EtcdUnavailable("no member of etcd is set")
        # A stopped member must not use up the time of the others.
        share_s = self._deadline_s / max(len(self._endpoints), 1)
        for endpoint in tuple(self._endpoints):
            try:
                with trio.fail_after(share_s):
                    return await self._at(endpoint, path, data, parse)
            except EtcdUnavailable as error:
                failure = error
            except OutcomeUnknown as error:
                failure = error
            except trio.TooSlowError:
                failure = OutcomeUnknown(f"{endpoint} has not answered within {share_s:g} s")
            self._demote(endpoint)
            if changes and isinstance(failure, OutcomeUnknown):
                break
        raise failure

    def _demote(self, endpoint: str) -> None:
        """Prefers the other members from now on, with a new token: a member waits until it has reached the state of the
        token, which takes forever if etcd was restored from a backup."""
        self._token = ""
        self._endpoints.remove(endpoint)
        self._endpoints.append(endpoint)

    async def _at(self, endpoint: str, path: str, data: bytes, parse: Callable[[bytes], T]) -> T:
        """Asks one member.

        :raises EtcdUnavailable: it has not received the request, or has no quorum. :raises OutcomeUnknown, EtcdRefused:
        :raises LeaseGone, Compacted:
        """
        fresh = False
        while True:
            if self._settings.user and not self._token:
                await self._sign_in(endpoint)
                fresh = True
            status, content = await self._send(endpoint, path, data)
            if status == 200:
                try:
                    return parse(content)
                except (msgspec.MsgspecError, ValueError, OverflowError):
                    raise OutcomeUnknown(f"{endpoint} does not answer as etcd does") from None
            failure = _failure(content)
            if failure.code != _UNAUTHENTICATED or not self._settings.user or fresh:
                raise _error_of(endpoint, status, failure)
            # A token ends after some minutes, and when etcd restarts.
            self._token = ""

    async def _sign_in(self, endpoint: str) -> None:
        body = {"name": self._settings.user, "password": self._settings.password}
        status, content = await self._send(endpoint, "/v3/auth/authenticate", msgspec.json.encode(body))
        if status != 200:
            raise _error_of(endpoint, status, _failure(content))
        try:
            self._token = msgspec.json.decode(content, type=SignedIn).token
        except (msgspec.MsgspecError, ValueError):
            raise EtcdRefused(f"{endpoint} does not answer as etcd does") from None

    async def _send(self, endpoint: str, path: str, data: bytes) -> tuple[int, bytes]:
        """Returns the status and the body of an answer. :raises EtcdUnavailable, OutcomeUnknown:"""
        async with self._stream(endpoint, path, data) as answer:
            content = b""
            async for piece in answer:
                content += piece
                if len(content) > MAX_ANSWER:
                    raise _TooLarge(f"{endpoint} answers with more than {MAX_ANSWER} bytes")
            return answer.status, content

    @asynccontextmanager
    async def _stream(self, endpoint: str, path: str, data: bytes) -> AsyncIterator[Answer]:
        """Sends a request to a member, and yields its answer, which may be endless.

        :raises EtcdUnavailable: it has not received the request. :raises OutcomeUnknown: the connection broke.
        """
        import httpx

        headers = _HEADERS | ({"Authorization": self._token} if self._token else {})
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        try:
            async with self._http.stream(
                "POST", endpoint + path, content=data, headers=headers, timeout=timeout
            ) as response:
                answer = Answer(response)
                try:
                    yield answer
                finally:
                    await answer.end()
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise EtcdUnavailable(f"{endpoint} can't be reached: {_text_of(error)}") from None
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
            raise OutcomeUnknown(f"{endpoint}: {_text_of(error)}") from None

    # Watches

    @asynccontextmanager
    async def watch(self, prefix: str, *, after: int) -> AsyncIterator[Watch]:
        """Yields the changes of all keys with a prefix, from the revision after `after` on.

        :raises EtcdUnavailable: the member does not begin the watch in time, or has ended it; the next watch uses
            another member. :raises Compacted: list again. :raises EtcdRefused:
        """
        endpoint = self._endpoints[0]
        try:
            if self._settings.user and not self._token:
                await self._sign_in_for_watch(endpoint)
            async with watching(endpoint, partial(self._stream, endpoint), prefix, after=after) as watch:
                yield watch
        except EtcdUnavailable:
            self._demote(endpoint)
            raise

    async def _sign_in_for_watch(self, endpoint: str) -> None:
        """Signs in for a watch. :raises EtcdUnavailable, EtcdRefused:"""
        try:
            with trio.fail_after(self._deadline_s):
                await self._sign_in(endpoint)
        except OutcomeUnknown as error:
            raise EtcdUnavailable(str(error)) from error
        except trio.TooSlowError:
            raise EtcdUnavailable(f"{endpoint} has not answered within {self._deadline_s:g} s") from None


class _TooLarge(OutcomeUnknown):
    """The answer is larger than the limit for data in memory."""


class Answer:
    """An answer that may be endless. Iterate over the pieces of its body."""

    def __init__(self, response: httpx.Response) -> None:
        self._pieces = response.aiter_raw()
        self._ended = False
        self.status = response.status_code

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        """Returns the next piece. :raises httpx.HTTPError: the connection broke."""
        try:
            return await anext(self._pieces)
        except BaseException:
            self._ended = True
            raise

    async def end(self) -> None:
        """Ends the request, unless the body was read to its end."""
        if self._ended:
            return
        import httpx

        # httpx's generators are nested, and closing the outermost leaves the others to the garbage collector. A read
        # that is cancelled ends all of them.
        with trio.CancelScope() as ending:
            ending.cancel()
            try:
                async for _ in self._pieces:
                    pass
            except httpx.HTTPError:
                pass


def make_etcd(settings: EtcdSettings, *, deadline_s: float = 10.0) -> Etcd:
    """Returns a client, which must be closed. It connects when it is first used.

    :param deadline_s: the deadline of each call, for all members that it asks
    """
    import httpx

    verify: ssl.SSLContext | bool = True if settings.context is None else settings.context
    # Neither a proxy of the environment nor its .netrc: what is sent is a secret.
    http = httpx.AsyncClient(verify=verify, trust_env=False, follow_redirects=False)
    return Etcd(http, settings, deadline_s=deadline_s)


@asynccontextmanager
async def open_etcd(settings: EtcdSettings, *, deadline_s: float = 10.0) -> AsyncIterator[Etcd]:
    """Yields a client, see `make_etcd`."""
    etcd = make_etcd(settings, deadline_s=deadline_s)
    try:
        yield etcd
    finally:
        await etcd.aclose()


def _page(content: bytes) -> tuple[Sequence[Entry], int, bool]:
    """Returns the keys of an answer, the revision, and whether there are more keys."""
    page = msgspec.json.decode(content, type=Ranged)
    return [each.entry for each in page.kvs], int(page.header.revision), page.more


def _transaction(content: bytes) -> Transaction:
    answer = msgspec.json.decode(content, type=Transacted)
    reads = [each.response_range for each in answer.responses if each.response_range is not None]
    found = tuple(each.kvs[0].entry if each.kvs else None for each in reads)
    return Transaction(answer.succeeded, int(answer.header.revision), found)


def _lease(content: bytes) -> Lease:
    granted = msgspec.json.decode(content, type=Granted)
    return Lease(int(granted.id), float(granted.ttl))


def _ttl_s(content: bytes) -> float:
    """Returns the TTL of a lease; 0 if it has ended."""
    kept = msgspec.json.decode(content, type=KeptAlive)
    if kept.result is None:
        raise ValueError(kept.error)
    return float(kept.result.ttl)


def _key(key: str) -> str:
    return range_of(key)["key"]


def _text_of(error: BaseException) -> str:
    """Returns the text of an error of httpx. Errors of TLS are only in its causes."""
    cause: BaseException | None = error
    while cause is not None:
        if str(cause):
            return str(cause)[:500]
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__


def _failure(content: bytes) -> Failure:
    try:
        return msgspec.json.decode(content, type=Failure)
    except (msgspec.MsgspecError, ValueError):
        return Failure(message=content[:200].decode("utf-8", "replace"))


def _error_of(endpoint: str, status: int, failure: Failure) -> EtcdError:
    text = f"{endpoint}: {failure.text or f'status {status}'}"
    if failure.code == _NOT_FOUND and "lease" in failure.text:
        return LeaseGone(text)
    if failure.code == _OUT_OF_RANGE:
        return Compacted()
    if failure.code == _UNAVAILABLE or status >= 500:
        return EtcdUnavailable(text) if failure.text.startswith(_UNCHANGED) else OutcomeUnknown(text)
    return EtcdRefused(text)
