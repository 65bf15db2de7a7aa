"""Loads the daemon's TLS certificate from files, or creates a self-signed one, and warns before it expires."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from volant.http import Credentials, server_context

from ._protection import UnreadableFile, others_may_read, read_given
from ._settings import Settings, SettingsError, parse_address, split

if TYPE_CHECKING:
    from cryptography import x509

_logger = logging.getLogger("volant.daemon")

_MAX_FILE = 1024 * 1024
"""Maximum size of a file."""
_SOON = timedelta(days=14)
"""How long before its expiry a certificate is reported."""
_SELF_SIGNED_DAYS = 3650
"""Lifetime of a self-signed certificate. It is long, because clients pin its fingerprint and would refuse a new one."""

RENEW = (
    "put a new one in place and reload the daemon: `sudo systemctl reload volantd`; restart it if the certificate is a "
    "systemd credential"
)
"""The steps to renew a certificate. systemd copies credentials when it starts a service, not when it reloads it."""


class Certificate(msgspec.Struct, frozen=True):
    """The current certificate, with the facts for operators."""

    credentials: Credentials
    fingerprint: str
    """SHA-256 of the certificate, as hexadecimal digits."""
    begins_at: datetime
    expires_at: datetime
    self_signed: bool

    def trouble(self, now: datetime) -> str | None:
        """Returns a warning if it has expired, is not valid yet or expires soon; None if it is valid. Soon means 14
        days, or the last third of a short lifetime."""
        if now >= self.expires_at:
            return f"the TLS certificate expired on {_day(self.expires_at)}, so clients refuse to connect"
        if now < self.begins_at:
            return f"the TLS certificate is not valid before {_day(self.begins_at)}, so clients refuse to connect"
        left = self.expires_at - now
        if left < min(_SOON, (self.expires_at - self.begins_at) / 3):
            return f"the TLS certificate expires on {_day(self.expires_at)}"
        return None

    def view(self) -> dict[str, object]:
        """Returns its facts for JSON."""
        return {
            "fingerprint": self.fingerprint,
            "expires_at": self.expires_at.isoformat().replace("+00:00", "Z"),
            "self_signed": self.self_signed,
            "client_certificates": bool(self.credentials.authorities),
        }


def load_certificate(settings: Settings) -> Certificate | None:
    """Returns the certificate of the settings; None if they have none. Creates the self-signed one if it does not
    exist.

    :raises SettingsError: a file can't be used; the message names it and the reason.
    """
    if settings.tls_self_signed:
        path = settings.state_dir / "tls.pem"
        if not path.exists():
            _make(path, settings)
        return _load(path, None, settings.client_ca, ("the self-signed certificate", "its key"))
    if settings.tls_cert is None:
        return None
    return _load(settings.tls_cert, settings.tls_key, settings.client_ca, ("tls_cert", "tls_key"))


def load_hosts_certificate(settings: Settings) -> Certificate:
    """Returns the certificate that a host of a fleet presents to the others, whose certificates `fleet_ca` has signed.

    :raises SettingsError: a file can't be used; the message names it and the reason.
    """
    assert settings.fleet_cert is not None
    return _load(
        settings.fleet_cert, settings.fleet_key, settings.fleet_ca, ("fleet_cert", "fleet_key"), ca_name="fleet_ca"
    )


def hosts_client_context(settings: Settings) -> ssl.SSLContext:
    """Returns the context for connections to etcd and to other hosts. The files have been checked.

    :raises SettingsError: they have changed in the meantime.
    """
    assert settings.fleet_cert is not None
    try:
        context = ssl.create_default_context(cafile=settings.fleet_ca)
        context.load_cert_chain(settings.fleet_cert, settings.fleet_key, password=lambda: b"")
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(f"fleet_cert {settings.fleet_cert} can't be used for TLS: {error}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load(
    path: Path, key_path: Path | None, client_ca: Path | None, names: tuple[str, str], *, ca_name: str = "client_ca"
) -> Certificate:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    leaf = _certificates(path, names[0])[0]
    # The key is loaded only to check it, because the errors of OpenSSL name neither file nor reason.
    key_file, key_name = (path, names[0]) if key_path is None else (key_path, names[1])
    key_data = _read(key_file, key_name)
    if others_may_read(key_file):
        _logger.warning("every user of this host can read the TLS key in %s; chmod 600 it", key_file)
    try:
        key = load_pem_private_key(key_data, None)
    except TypeError:
        raise SettingsError(f"{key_name} {key_file} is encrypted; volantd needs the key without a passphrase") from None
    except ValueError:
        raise SettingsError(f"{key_name} {key_file} has no private key in PEM") from None
    except UnsupportedAlgorithm as error:
        raise SettingsError(f"{key_name} {key_file} can't be used: {error}") from None
    try:
        belong_together = key.public_key() == leaf.public_key()
    except (UnsupportedAlgorithm, ValueError) as error:
        raise SettingsError(f"{names[0]} {path} can't be used: {error}") from None
    if not belong_together:
        raise SettingsError(f"{key_name} {key_file} is not the key of the certificate in {names[0]} {path}")
    authorities = ""
    if client_ca is not None:
        _certificates(client_ca, ca_name)
        authorities = _read(client_ca, ca_name).decode("ascii", "replace")
    try:
        context = server_context(path, key_path, authorities)
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(f"{names[0]} {path} can't be used for TLS: {error}") from None
    trusted = frozenset(context.get_ca_certs(binary_form=True)) if authorities else frozenset()
    if authorities and not trusted:
        raise SettingsError(f"{ca_name} {client_ca} has no certificate of an authority: none is marked as a CA")
    return Certificate(
        Credentials(context, trusted),
        sha256(_der(leaf)).hexdigest(),
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
        leaf.issuer == leaf.subject,
    )


def _certificates(path: Path, name: str) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(path, name))
    except ValueError:
        raise SettingsError(f"{name} {path} has no certificate in PEM") from None


def _read(path: Path, name: str) -> bytes:
    try:
        return read_given(path, _MAX_FILE)
    except UnreadableFile as error:
        raise SettingsError(f"{name} {path} {error}") from None


def _make(path: Path, settings: Settings) -> None:
    """Writes a self-signed certificate and its key into one file, atomically."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    host = socket.gethostname()[:60] or "localhost"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A client's clock may be slow.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=_SELF_SIGNED_DAYS))
        .add_extension(x509.SubjectAlternativeName(_general_names(host, settings)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    data = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    part = path.with_name(f"{path.name}.{secrets.token_hex(6)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SettingsError(f"the self-signed certificate {path} can't be written: {error.strerror}") from None


def _general_names(host: str, settings: Settings) -> Iterable[x509.GeneralName]:
    from cryptography import x509

    addresses = [address for address in split(settings.api_listen_addr) if not address.startswith("unix:")]
    hosts = ["localhost", "127.0.0.1", "::1", host, *(parse_address(address)[0] for address in addresses)]
    names: list[x509.GeneralName] = []
    for each in dict.fromkeys((*hosts, *map(_host_of, split(settings.allowed_hosts)))):
        try:
            names.append(x509.IPAddress(ip_address(each)))
        except ValueError:
            if each.isascii():
                names.append(x509.DNSName(each))
    return names


def _host_of(name: str) -> str:
    """Returns the host in `HOST`, `HOST:PORT`, `[IPv6]`, `[IPv6]:PORT` or `IPv6`."""
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name if name.count(":") > 1 else name.partition(":")[0]


def _der(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.DER)


def _day(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M} UTC"
