"""The fleet in the settings: the address of etcd, this host's identity, and the certificates of hosts.

Hosts and etcd are one trust domain: a program with a certificate of `fleet_ca` is a host, to etcd and to the others.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from volant.fleet import EtcdSettings
from volant.http import Credentials
from volant.model import Problem, check_labels, is_name

from ._protection import UnreadableFile, read_given
from ._settings import Settings, SettingsError, parse_address, split
from ._tls import hosts_client_context, load_hosts_certificate

_PREFIX = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*/\Z")
_WILDCARDS = ("0.0.0.0", "::", "")
_MAX_PASSWORD = 4096


class FleetPlan(msgspec.Struct, frozen=True):
    """The fleet in the settings."""

    host: str
    address: str
    """The address at which other hosts reach this one; port 0 means a free port."""
    etcd: EtcdSettings
    prefix: str
    server: Credentials
    """The credentials for other hosts that connect."""
    client: ssl.SSLContext
    """The context for connections to other hosts."""
    zone: str
    labels: Mapping[str, str]
    ttl_s: int


def fleet_of(settings: Settings) -> FleetPlan:
    """Returns the fleet. :raises SettingsError: a setting is missing or invalid."""
    endpoints = tuple(split(settings.fleet_etcd))
    for endpoint in endpoints:
        _check_endpoint(endpoint)
    host = settings.fleet_host or socket.gethostname().partition(".")[0].lower()
    if not is_name(host):
        raise SettingsError(f"fleet_host {host[:80]!r} is not a name: lower-case letters, digits and dashes")
    if not _PREFIX.match(settings.fleet_prefix):
        raise SettingsError(f"fleet_prefix {settings.fleet_prefix[:80]!r} is not like volant/, with a slash at its end")
    server = load_hosts_certificate(settings).credentials
    context = hosts_client_context(settings)
    return FleetPlan(
        host=host,
        address=_address(settings),
        etcd=EtcdSettings(
            endpoints=endpoints, user=settings.fleet_etcd_user, password=_password(settings), context=context
        ),
        prefix=settings.fleet_prefix,
        server=server,
        client=context,
        zone=settings.fleet_zone,
        labels=_labels(settings),
        ttl_s=settings.fleet_ttl_s,
    )


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        fits = parts.scheme == "https" and parts.hostname and not parts.username and parts.path in ("", "/")
        _ = parts.port
    except ValueError:
        fits = False
    if not fits:
        raise SettingsError(
            f"fleet_etcd has {endpoint[:100]!r}, which is not like https://etcd1:2379; etcd has to check certificates, "
            "as whoever can write to it controls all hosts"
        )


def _address(settings: Settings) -> str:
    """Returns the address at which other hosts reach this one. :raises SettingsError:"""
    for name in ("fleet_listen", "fleet_address"):
        if given := getattr(settings, name):
            try:
                _, port = parse_address(given)
            except SettingsError:
                raise SettingsError(f"{name} {given[:100]!r} is not HOST:PORT or [IPv6]:PORT") from None
            if not 0 <= port <= 65535:
                raise SettingsError(f"{name} {given[:100]}: {port} is not a port")
    if not settings.fleet_address and parse_address(settings.fleet_listen)[0] in _WILDCARDS:
        raise SettingsError(f"fleet_listen {settings.fleet_listen} is no address to connect to; set fleet_address too")
    return settings.fleet_address or settings.fleet_listen


def _labels(settings: Settings) -> Mapping[str, str]:
    labels = {}
    for text in split(settings.fleet_labels):
        key, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"fleet_labels has {text[:80]!r}, which is not KEY=VALUE")
        labels[key] = value
    try:
        check_labels(labels)
    except Problem as problem:
        raise SettingsError(f"fleet_labels: {problem.detail}") from None
    return labels


def _password(settings: Settings) -> str:
    path: Path | None = settings.fleet_etcd_password_file
    if not settings.fleet_etcd_user:
        return ""
    if path is None:
        raise SettingsError("fleet_etcd_user needs fleet_etcd_password_file")
    try:
        return read_given(path, _MAX_PASSWORD).decode().strip()
    except UnreadableFile as error:
        raise SettingsError(f"fleet_etcd_password_file {path} {error}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"fleet_etcd_password_file {path} is not text in UTF-8") from None
