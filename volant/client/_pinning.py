"""TLS connections to a daemon whose certificate is trusted by its fingerprint instead of its signature, or is not
trusted yet."""

from __future__ import annotations

import hmac
import ssl
import time
from hashlib import sha256
from typing import cast

from ._address import Address
from ._plain import connect
from ._tls import Tls
from ._transport import CONNECT_S


def shown_fingerprint(address: Address, tls: Tls) -> str:
    """Returns the SHA-256 fingerprint of the daemon's certificate. Sends no request, only a TLS handshake.

    :raises Unreachable: the connection or the handshake fails.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if tls.cert_file is not None:
        context.load_cert_chain(tls.cert_file, tls.key_file, password=lambda: b"")
    with connect(address, time.monotonic() + CONNECT_S, context) as connection:
        assert isinstance(connection, ssl.SSLSocket)
        return sha256(connection.getpeercert(True) or b"").hexdigest()


class _Pinned(ssl.SSLContext):
    """A context whose sessions end in the handshake unless the daemon presents the pinned certificate."""

    fingerprint: str


def pinned(fingerprint: str) -> ssl.SSLContext:
    """Returns a context that trusts the certificate with this SHA-256, in 64 digits, and no other."""
    context = _Pinned(ssl.PROTOCOL_TLS_CLIENT)
    context.fingerprint = fingerprint
    # Neither its names nor its time count: the certificate itself is known.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Trio and httpx make objects, blocking sockets are wrapped.
    context.sslobject_class = _Object
    context.sslsocket_class = _Socket
    return context


class _Object(ssl.SSLObject):
    def do_handshake(self) -> None:
        super().do_handshake()
        _check(cast("_Pinned", self.context), self.getpeercert(True))


class _Socket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        _check(cast("_Pinned", self.context), self.getpeercert(True))


def _check(context: _Pinned, certificate: bytes | None) -> None:
    shown = sha256(certificate or b"").hexdigest()
    if not hmac.compare_digest(shown, context.fingerprint):
        raise ssl.SSLCertVerificationError(
            1, f"the daemon's certificate has the fingerprint {shown}, not the expected {context.fingerprint}"
        )
