"""TLS for the server: the certificate that it presents, and the session of each client.

A session is a filter between the bytes of a socket and those of HTTP, and does no I/O. So deadlines, half-closes and
the detection of disconnected clients work as on plain connections. The certificate can be replaced at any time: a
session keeps the one with which it began.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

_PIECE = 64 * 1024
_CIPHERS_1_2 = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Only authenticated encryption with forward secrecy, as in TLS 1.3."""
_KINDS = {"commonName": "CN", "DNS": "DNS", "URI": "URI", "email": "EMAIL"}

PLAIN_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n"
    b"Content-Length: 56\r\n\r\nThis port expects TLS: use https:// instead of http://.\n"
)
"""The answer to a request in plain text."""


class ClientCertificate(msgspec.Struct, frozen=True):
    """The certificate of a client, verified with the authorities of `client_ca`."""

    names: tuple[str, ...]
    """Its common names and the names in its `subjectAltName`: `CN=ci`, `URI=spiffe://example/ci`, `DNS=ci.example`,
    `EMAIL=ci@example`."""
    expires_at: float
    """The expiry, in seconds since the epoch."""

    @property
    def is_expired(self) -> bool:
        """Whether it has expired since the handshake."""
        return time.time() >= self.expires_at


class Credentials(msgspec.Struct, frozen=True):
    """The certificate that a server presents to clients, and the authorities whose client certificates it accepts."""

    context: ssl.SSLContext
    authorities: frozenset[bytes] = frozenset()
    """CA certificates for clients, in DER. Without any, the server requests no certificate from clients."""


class Tls:
    """Holds the current credentials, and the sessions of clients that have presented a certificate.

    :param required: returns whether clients must present a certificate; called for each handshake, as API keys are
        created and deleted while the server runs
    """

    def __init__(self, credentials: Credentials, required: Callable[[], bool] = lambda: False) -> None:
        self._credentials = credentials
        self._required = required
        self._known: dict[Session, Callable[[], None]] = {}

    @property
    def credentials(self) -> Credentials:
        """The credentials of new sessions."""
        return self._credentials

    def session(self) -> Session:
        """Begins a session with a client."""
        credentials = self._credentials
        if credentials.authorities:
            credentials.context.verify_mode = ssl.CERT_REQUIRED if self._required() else ssl.CERT_OPTIONAL
        return Session(credentials)

    def replace(self, credentials: Credentials) -> int:
        """Uses other credentials for new sessions, and cuts the connections of clients whose certificate was issued by
        a removed authority. Returns the number of cut connections."""
        self._credentials = credentials
        refused = [end for session, end in self._known.items() if not session.is_of(credentials)]
        for end in refused:
            end()
        return len(refused)

    def keep(self, session: Session, end: Callable[[], None]) -> None:
        """Adds a session to the ones that `replace` checks, if its client has presented a certificate.

        :param end: cuts its connection
        """
        if session.certificate is None:
            return
        if session.is_of(self._credentials):
            self._known[session] = end
        else:
            # The authority was removed during the handshake.
            end()

    def forget(self, session: Session) -> None:
        """Removes a session that has ended."""
        self._known.pop(session, None)


class Session:
    """The session of one client. All methods raise `ssl.SSLError` if the client violates the protocol."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = credentials.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._authority: bytes | None = None
        self._drained = True
        self.certificate: ClientCertificate | None = None
        """The client's certificate, after the handshake; None if it has presented none."""
        self.ended = False
        """Whether the client has closed its direction."""

    @property
    def has_output(self) -> bool:
        """Whether TLS has bytes to send to the client."""
        return self._outgoing.pending > 0

    def feed(self, data: bytes) -> None:
        """Adds bytes that the socket has received."""
        self._incoming.write(data)
        self._drained = False

    def handshake(self) -> bool:
        """Continues the handshake. Returns whether it is complete."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        if self._credentials.authorities:
            self.certificate, self._authority = _verified(self._object)
        return True

    def read(self) -> bytes:
        """Returns decrypted bytes from the client, about 64 KiB at most. Empty if it must be fed first, or has
        `ended`."""
        if self._drained or self.ended:
            return b""
        pieces: list[bytes] = []
        size = 0
        while size < _PIECE:
            try:
                piece = self._object.read(_PIECE)
            except ssl.SSLWantReadError:
                self._drained = True
                break
            if not piece:
                self.ended = True
                break
            pieces.append(piece)
            size += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def encrypt(self, data: bytes) -> bytes:
        """Returns the bytes to send for `data`, including pending bytes of TLS."""
        if data:
            self._object.write(data)
        return self._outgoing.read()

    def close(self) -> bytes:
        """Returns the last bytes to send: an alert, or the end of the session (`close_notify`)."""
        try:
            self._object.unwrap()
        except ssl.SSLError:
            # The client's own `close_notify` may still come, or there was no handshake.
            pass
        return self._outgoing.read()

    def is_of(self, credentials: Credentials) -> bool:
        """Returns whether `credentials` trust the authority that verified the client's certificate. A resumed session
        has no chain, so they must trust all authorities of its original context, any of which may be the one."""
        if self._authority is None:
            return self._credentials.authorities <= credentials.authorities
        return self._authority in credentials.authorities


def server_context(certificate: Path, key: Path | None, authorities: str = "") -> ssl.SSLContext:
    """Returns a context for TLS 1.2 and 1.3 without renegotiation, compression and old ciphers.

    :param certificate: a PEM file with the certificate and its chain, and with the key if `key` is None
    :param authorities: CA certificates for clients, in PEM
    :raises ssl.SSLError: a file has no certificate or key, or the key does not belong to the certificate.
    :raises OSError: a file can't be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS_1_2)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    # Without the function, OpenSSL would ask for a passphrase on the terminal.
    context.load_cert_chain(certificate, key, password=lambda: b"")
    if authorities:
        # An intermediate authority in the file is trusted without its root.
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=authorities)
    return context


def looks_like_http(data: bytes) -> bool:
    """Returns whether the first bytes of a client are an HTTP request in plain text, not a handshake."""
    return data[:1].isalpha() and data[:1].isupper() and data[:8].partition(b" ")[0].isalpha()


def _verified(session: ssl.SSLObject) -> tuple[ClientCertificate | None, bytes | None]:
    """Returns the client's certificate, and the authority that verified it, in DER."""
    shown: Any = session.getpeercert()
    if not shown:
        return None, None
    fields = [field for names in shown.get("subject", ()) for field in names]
    names = [f"{_KINDS[kind]}={value}" for kind, value in (*fields, *shown.get("subjectAltName", ())) if kind in _KINDS]
    chain = _verified_chain(session)
    expires_at = float(ssl.cert_time_to_seconds(shown["notAfter"]))
    return ClientCertificate(tuple(names), expires_at), chain[-1] if chain else None


def _verified_chain(session: ssl.SSLObject) -> list[bytes]:
    if hasattr(session, "get_verified_chain"):
        return list(session.get_verified_chain())
    # Before Python 3.13 only the object behind it has the method.
    chain: Any = session._sslobj.get_verified_chain()  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in chain or ()]
