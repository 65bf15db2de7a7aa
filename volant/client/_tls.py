"""TLS settings of a client: which daemon it trusts, and its own certificate."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    # Most commands of `volar` don't need it.
    import ssl

_FINGERPRINT = re.compile(r"[0-9a-f]{64}\Z")


class Tls(msgspec.Struct, frozen=True):
    """The certificates that a client trusts, and its own. Paths are of PEM files."""

    ca_file: str | None = None
    """Certificates of trusted authorities; None for the system's."""
    fingerprint: str | None = None
    """The SHA-256 of the daemon's certificate. Only this certificate is trusted, regardless of its signer."""
    cert_file: str | None = None
    """A certificate to present to the daemon."""
    key_file: str | None = None
    """Its key, if it is in a separate file."""

    def context(self) -> ssl.SSLContext:
        """Returns a context for connections. :raises ValueError: a file can't be used; the message names it."""
        import ssl

        from ._pinning import pinned

        if self.fingerprint is not None:
            context = pinned(normal_fingerprint(self.fingerprint))
        else:
            try:
                context = ssl.create_default_context(cafile=self.ca_file)
            except (OSError, ssl.SSLError) as error:
                raise ValueError(f"the file of CA certificates {self.ca_file!r} can't be used: {_why(error)}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("there is a key for a client certificate, but no certificate")
        if self.cert_file is not None:
            try:
                # Without the function, OpenSSL would ask for a passphrase on the terminal.
                context.load_cert_chain(self.cert_file, self.key_file, password=lambda: b"")
            except (OSError, ssl.SSLError) as error:
                files = f"{self.cert_file!r}" + (f" with the key {self.key_file!r}" if self.key_file else "")
                raise ValueError(f"the client certificate {files} can't be used: {_why(error)}") from None
        return context


def normal_fingerprint(text: str) -> str:
    """Returns a SHA-256 fingerprint as 64 digits, without colons. :raises ValueError: it is malformed."""
    digits = text.strip().replace(":", "").lower()
    if not _FINGERPRINT.match(digits):
        raise ValueError(f"{text[:100]!r} is no SHA-256 fingerprint: it has 64 hexadecimal digits")
    return digits


def _why(error: OSError) -> str:
    return error.strerror or str(error)
