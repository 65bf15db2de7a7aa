"""The address of the daemon: its notation, and the error if it can't be reached."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from ._errors import Unreachable

DEFAULT_BASE = "http://127.0.0.1:7777"
_UNIX = "unix:"
SERVICE_SOCKET = "/run/volant/volant.sock"
"""The socket of the service that `volar setup` installs."""


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed base address."""

    text: str
    """The address as written, for messages."""
    host: str
    port: int
    tls: bool = False
    socket_path: str | None = None
    """The path of a Unix socket, which replaces host and port."""
    prefix: str = ""
    """A proxy's path before the API's own: percent-encoded, without a slash at its end."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parses `http://HOST[:PORT][/PREFIX]`, `https://…`, `HOST:PORT` or `unix:/PATH`.

        :raises ValueError: it is none of these; the message is meant for people.
        """
        if text.startswith(_UNIX):
            path = text.removeprefix(_UNIX)
            if not path.startswith("/"):
                raise ValueError(f"{text!r} is no address: unix: needs an absolute path")
            return cls(text, "localhost", 80, socket_path=path)
        parts = urlsplit(text if "://" in text else f"http://{text}")
        try:
            port = parts.port
        except ValueError:
            raise ValueError(f"{text!r} is no address: its port is no number up to 65535") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{text!r} is no address: write http://HOST:PORT, https://HOST:PORT or unix:/PATH")
        if parts.username is not None or parts.password is not None:
            raise ValueError("an address has no user and password; put the key into VOLANT_API_KEY")
        tls = parts.scheme == "https"
        try:
            host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
        except UnicodeError:
            raise ValueError(f"{text!r} is no address: its host is not a valid name") from None
        prefix = quote(parts.path.rstrip("/").encode("utf-8", "surrogateescape"), safe="/%:@!$&'()*+,;=~")
        return cls(text, host, port or (443 if tls else 80), tls=tls, prefix=prefix)

    @property
    def host_header(self) -> str:
        """The value of `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def http_url(self) -> str:
        """The base URL for an HTTP client."""
        return f"{'https' if self.tls else 'http'}://{self.host_header}{self.prefix}"

    def unreachable(self, reason: str) -> Unreachable:
        """Returns the error for a connection that could not be made."""
        if self.socket_path is not None and reason == os.strerror(errno.EACCES):
            return Unreachable(
                f"the daemon can't be reached at {self.text}: {reason}",
                hint="members of its group may: run `sudo usermod -aG volant $USER` and log in again, or use sudo",
            )
        if self.tls and "fingerprint" in reason:
            return Unreachable(
                f"the daemon can't be reached at {self.text}: {reason}",
                hint="if its certificate was replaced, compare with `volar system info` on its host, and add it again",
            )
        if self.tls and " alert " in reason:
            return Unreachable(
                f"the daemon refuses the connection to {self.text}: {reason}",
                hint="it may require a client certificate: --client-cert and --client-key",
            )
        if self.tls and "certificate" in reason:
            return Unreachable(
                f"the daemon's certificate at {self.text} is not trusted: {reason}",
                hint="name its authority with --ca-file, or pin its fingerprint with `volar remote add`",
            )
        return Unreachable(
            f"the daemon can't be reached at {self.text}: {reason}",
            hint="start it with `volantd`, or name its address with --api or VOLANT_API_BASE",
        )


def reason_of(error: BaseException) -> str:
    """Returns the operating system's text for an error that libraries have wrapped."""
    found: BaseException | None = error
    text = str(error) or type(error).__name__
    while found is not None:
        if isinstance(found, OSError) and found.errno is not None:
            # Errors of TLS and of name resolution have numbers of their own.
            is_errno = found.errno > 0 and type(found).__module__ != "ssl"
            text = os.strerror(found.errno) if is_errno else found.strerror or text
        inner = found.exceptions[0] if isinstance(found, BaseExceptionGroup) else None
        found = inner or found.__cause__ or found.__context__
    return text
