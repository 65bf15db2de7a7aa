"""Gets the certificate of a daemon that is not trusted yet."""

from __future__ import annotations

import ssl
import time
from hashlib import sha256

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
