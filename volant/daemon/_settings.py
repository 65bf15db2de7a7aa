"""Loads the settings from a TOML file, `VOLANT_*` variables and flags; each overrides the one before.

`Settings` is the only table: its fields are the keys in the file, with `VOLANT_` and in capitals the variables, with
hyphens the flags. An unknown key or flag is an error. An unknown `VOLANT_*` is a warning, because
another program or version may read it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from volant.directories import AllowedDirectory, parse_allowed
from volant.http import Subject, parse_subject
from volant.identity import OidcSettings, oidc_obstacle, parse_role_rule
from volant.images import Origins, parse_networks
from volant.journal import requires_keys
from volant.model import DEFAULT_SUBNET, is_safe_url, parse_subnet

from ._protection import (
    Protection,
    ProtectionError,
    Secret,
    check_origin,
    others_may_read,
    protection,
    read_client_secret,
)

_CLIENT_SIDE = {"VOLANT_API_BASE", "VOLANT_REMOTE", "VOLANT_CA_FILE", "VOLANT_CLIENT_CERT", "VOLANT_CLIENT_KEY"}
_NEVER_EMPTY = {
    *("api_key", "api_key_file", "api_allow_cidr", "trusted_proxies"),
    *("tls_cert", "tls_key", "client_ca", "tls_subjects"),
    *("oidc_issuer", "oidc_audience", "oidc_roles", "oidc_name_claim"),
}
_CREDENTIALS = {
    "api_key_file": "volant-api-key",
    "tls_cert": "volant-tls-cert",
    "tls_key": "volant-tls-key",
    "client_ca": "volant-client-ca",
    "fleet_cert": "volant-fleet-cert",
    "fleet_key": "volant-fleet-key",
    "fleet_ca": "volant-fleet-ca",
    "fleet_etcd_password_file": "volant-fleet-etcd-password",
    "oidc_client_secret_file": "volant-oidc-client-secret",
    "secrets_key_file": "volant-secrets-key",
}
"""The settings for files that can be systemd credentials, with the names of the credentials."""
_ABSOLUTE = (
    *("state_dir", "runtime_dir", "cache_dir", "oci_ca_dir", "oci_auth_file", "secrets_key_file"),
    "oidc_client_secret_file",
    *("tls_cert", "tls_key", "client_ca", "fleet_cert", "fleet_key", "fleet_ca", "fleet_etcd_password_file"),
)
_FIRST_UID, _LEAST_UIDS = 1000, 512

MAX_NAMESERVERS = 3
"""The C library's limit (resolv.conf(5))."""
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,13}")
"""The pattern is shorter than a tap's name, so that it never matches one."""

_AUTO_OVERCOMMIT = 4.0
"""With this factor each VM keeps a quarter of its remaining memory in reserve."""

DEFAULT_ADDRESS = "127.0.0.1:7777"

RELOADED = (
    *("api_key", "api_key_file", "api_allow_cidr", "trusted_proxies", "allowed_hosts", "cors_origins"),
    *("tls_cert", "tls_key", "client_ca", "tls_subjects"),
    *("oidc_issuer", "oidc_audience", "oidc_roles", "oidc_name_claim"),
    *("oidc_client_id", "oidc_client_secret_file", "oidc_scopes"),
    *("key_requests_per_s", "key_requests_at_once", "key_body_kb"),
)
"""Settings that a running daemon reloads on SIGHUP."""


class SettingsError(Exception):
    """A setting is invalid. The text says which one, where it was set, and what would be valid."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of `volantd`; see `resolve`. A field's docstring is its help text."""

    api_listen_addr: str = DEFAULT_ADDRESS
    """Addresses to listen on: `HOST:PORT` or `unix:/PATH`, comma-separated. Port 0 takes a free port."""
    state_dir: Path
    """Directory for persistent data: the database, VM logs and VM disks."""
    runtime_dir: Path
    """Directory for sockets and consoles. At most 70 bytes, as a socket path has 108."""
    cache_dir: Path
    """Directory for data that can be built or downloaded again: boot images, artifacts of plugins."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    """`auto`: KVM if a probe shows that it runs guests, otherwise emulation."""
    kernel: Path | None = None
    """Kernel to boot instead of the built image's, for VMs whose plugin has none."""
    initramfs: Path | None = None
    """Initramfs to boot instead of the built image's, for VMs whose plugin has none."""
    max_vms: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Maximum number of VMs. Without it, memory is the limit."""
    memory_overcommit: Annotated[float, msgspec.Meta(ge=1, le=100)] | Literal["auto"] = "auto"
    """How many times the host's memory may be promised to VMs, while enough is free for the memory that they may still
    use. `auto`: 4 times; 1: once, so that all VMs can use all of theirs."""
    return_memory: Literal["on", "off"] = "on"
    """`on`: memory that guests free is returned to the host, for VMs that booted cold; `off`: guests keep it."""
    max_boots: Annotated[int, msgspec.Meta(ge=1, le=10000)] | None = None
    """Maximum number of VMs that boot at the same time; others wait. By default two for each CPU."""
    api_key: Secret | None = None
    """API key for clients. Set it in the environment or the file; it has no flag."""
    api_key_file: Path | None = None
    """File with API keys, one per line. By default systemd's credential `volant-api-key`, if there is one."""
    tls_cert: Path | None = None
    """Certificate file in PEM, with the chain. With it, TCP is served only with TLS. By default systemd's credential
    `volant-tls-cert`, if there is one."""
    tls_key: Path | None = None
    """Private key file of `tls_cert`, unless it is in the same file. By default systemd's credential
    `volant-tls-key`, if there is one."""
    tls_self_signed: bool = False
    """Serve TCP only with TLS, with a self-signed certificate that is created once and kept in the state directory."""
    client_ca: Path | None = None
    """CA certificates in PEM. Clients can then use a certificate of these authorities instead of a key. By default
    systemd's credential `volant-client-ca`, if there is one."""
    tls_subjects: str = ""
    """Roles of client certificates, comma-separated: `CN=ci:operator:web`, `URI=spiffe://example/ops:admin`."""
    oidc_issuer: str = ""
    """URL of an OpenID Connect issuer. Its tokens are accepted, with the roles of `oidc_roles`."""
    oidc_audience: str = ""
    """Audiences of tokens for this daemon, comma-separated. Tokens for others are refused."""
    oidc_roles: str = ""
    """Roles of tokens, comma-separated: `groups=ops:admin`, `sub=ci-*:operator:web`. The first that matches counts."""
    oidc_name_claim: str = "sub"
    """Claim with the name of a caller, for logs and events."""
    oidc_client_id: str = ""
    """Client id with which `volar login` signs in, by default the first audience. If it is set, users can also sign in
    to the console with it."""
    oidc_client_secret_file: Path | None = None
    """File with the secret of that client, if it has one. Only the console uses it. By default systemd's credential
    `volant-oidc-client-secret`, if there is one."""
    oidc_scopes: str = "openid profile offline_access"
    """Scopes that `volar login` requests, and the console without `offline_access`."""
    api_allow_cidr: str = ""
    """Networks from which requests are allowed, comma-separated. By default all."""
    trusted_proxies: str = ""
    """Networks of proxies whose `X-Forwarded-For` is trusted, comma-separated."""
    key_requests_per_s: Annotated[int, msgspec.Meta(ge=0, le=10**6)] = 200
    """Requests per second of each caller with a named key, a client certificate or a token; after a pause, twice as
    many at once. 0 for no limit."""
    key_requests_at_once: Annotated[int, msgspec.Meta(ge=0, le=10**6)] = 200
    """Requests and streams that each such caller may have open. 0 for no limit."""
    key_body_kb: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = 4096
    """Size of unfinished JSON bodies of each such caller, in KiB. With 0, only the limit for all callers together
    applies."""
    allowed_hosts: str = ""
    """More host names that clients may use for the daemon, comma-separated; see the reference on `Host`."""
    cors_origins: str = ""
    """Origins of web pages that may use the API, comma-separated."""
    agent_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 120.0
    """Deadline for a boot, from the launch to the agent's first answer."""
    image_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 300.0
    """Deadline for building a boot image."""
    artifact_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 1800.0
    """Deadline for downloading one artifact of a plugin."""
    artifact_max_mb: Annotated[int, msgspec.Meta(gt=0, le=2**24)] = 16384
    """Maximum size of a plugin's artifact."""
    artifact_dirs: str = ""
    """Host directories whose files plugin manifests may name, comma-separated."""
    artifact_allow_cidr: str = ""
    """Private networks from which artifacts of plugins may be downloaded, comma-separated."""
    oci_cache_max_mb: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 20480
    """Disk space for all OCI images. The least recently used ones that no VM uses are removed first."""
    oci_max_mb: Annotated[int, msgspec.Meta(gt=0, le=2**24)] = 65536
    """Maximum size of an OCI image's compressed layers."""
    oci_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 1800.0
    """Deadline for fetching and converting an OCI image."""
    oci_stall_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0
    """A fetch of an OCI image ends when no byte has arrived for this long."""
    oci_plain_http: str = ""
    """Registries that may be used without TLS, as `HOST` or `HOST:PORT`, comma-separated."""
    oci_ca_dir: Path | None = None
    """Directory of CA certificates (`*.crt`) for registries. By default `/etc/containers/certs.d`."""
    oci_auth_file: Path | None = None
    """Auth file, written by `skopeo login`, for clients that send no credentials for a registry."""
    transfer_mbps: Annotated[float, msgspec.Meta(gt=0, le=2**20)] | None = None
    """Maximum MiB per second of all snapshots on their way to or from registries together. By default no limit."""
    transfer_max_mb: Annotated[int, msgspec.Meta(gt=0, le=2**24)] = 65536
    """Maximum size of a pulled snapshot's files on the disk."""
    transfer_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=7 * 86400)] = 21600.0
    """Deadline for pushing or pulling one snapshot."""
    secrets_key_file: Path | None = None
    """File with the encryption keys of secrets, 64 hexadecimal digits per line, created if it does not exist. By
    default systemd's credential `volant-secrets-key`, otherwise `secrets.key` in the directory `STATE_DIR-keys`."""
    host_dirs: str = ""
    """Host directories that VMs may mount, with their content, comma-separated: `/PATH` to read, `/PATH:rw` to write as
    the directory's owner. By default none."""
    templates: Literal["auto", "off"] = "auto"
    """`auto`: the daemon makes a template after each cold boot, and clones similar VMs from it."""
    templates_max_mb: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 4096
    """Disk space for all templates. The least recently used ones are removed first."""
    templates_max_age_s: Annotated[float, msgspec.Meta(gt=0, le=10 * 366 * 86400)] = 30 * 86400.0
    """Templates that were not used for this long are removed."""
    standby: Annotated[int, msgspec.Meta(ge=0, le=64)] | Literal["auto"] = "auto"
    """Warm processes for each recently used template. A VM claims one instead of starting its own. `auto`: as many as
    recent VMs would have claimed, in a quarter of the free memory; 0 for none."""
    standby_max_mb: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 2048
    """Guest memory for all warm processes together."""
    standby_idle_s: Annotated[float, msgspec.Meta(gt=0, le=366 * 86400)] = 600.0
    """A template that was not used for this long keeps no warm processes."""
    network: Literal["auto", "none", "bridge", "user"] = "auto"
    """Network of VMs that are created without one. `auto`: the first that the host supports of `bridge`, `user`
    and `none`."""
    bridge: str = ""
    """Name of the bridge. By default it contains a digest of the state directory."""
    subnet: str = str(DEFAULT_SUBNET)
    """Subnet of the bridge. VMs get their addresses from it."""
    nameservers: str = ""
    """DNS servers for guests with a network interface: IPv4 addresses, comma-separated. By default the host's."""
    sandbox: Literal["auto", "off"] = "auto"
    """Sandbox for hypervisors. `auto`: every layer that this host supports; `off`: only QEMU's own `-sandbox`."""
    vm_uids: str = "65536-98303"
    """User and group ids for hypervisors, as FIRST-LAST. Nothing else on the host may use them."""
    cpu_priority: Literal["auto", "off"] = "auto"
    """`auto`: the daemon gets CPU time before busy VMs; `off`: all get equal shares."""
    insecure: bool = False
    """Allow addresses other than loopback with neither API keys nor a list of networks."""
    ephemeral: bool = False
    """On a clean stop, delete all VMs and remove the state and runtime directories. For demos and tests."""
    audit_max_records: Annotated[int, msgspec.Meta(ge=1000, le=10**9)] = 1_000_000
    """Maximum records of the audit log. The oldest ones are removed first."""
    audit_max_age_s: Annotated[float, msgspec.Meta(ge=60, le=100 * 366 * 86400)] = 90 * 86400.0
    """Maximum age of records of the audit log. Older ones are removed."""
    fleet_etcd: str = ""
    """URLs of the members of an etcd cluster, comma-separated: `https://etcd1:2379`. With them the host is a member of
    a fleet."""
    fleet_listen: str = ""
    """Address for the other hosts of the fleet, `HOST:PORT`. Clients do not use it."""
    fleet_address: str = ""
    """Address at which the other hosts reach `fleet_listen`, `HOST:PORT`. By default that address itself."""
    fleet_host: str = ""
    """Name of this host in the fleet. By default the host name."""
    fleet_cert: Path | None = None
    """Certificate file in PEM of this host, with its name or address, for etcd and other hosts."""
    fleet_key: Path | None = None
    """Private key file of `fleet_cert`, unless it is in the same file."""
    fleet_ca: Path | None = None
    """CA certificates in PEM that sign only the hosts of the fleet and etcd."""
    fleet_etcd_user: str = ""
    """User of etcd, if it requires one besides the certificate."""
    fleet_etcd_password_file: Path | None = None
    """File with the password of that user."""
    fleet_prefix: str = "volant/"
    """Prefix of the fleet's keys in etcd. Hosts with different prefixes are in different fleets."""
    fleet_zone: str = ""
    """Zone of this host, such as a rack or a data centre, for `volar hosts`."""
    fleet_labels: str = ""
    """Labels of this host, comma-separated: `disk=nvme,gpu=none`, for `volar hosts`."""
    fleet_ttl_s: Annotated[int, msgspec.Meta(ge=5, le=600)] = 15
    """Seconds without a sign of life after which a host counts as unreachable."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of log lines."""

    @property
    def uses_tls(self) -> bool:
        """Whether TCP is served with TLS."""
        return self.tls_cert is not None or self.tls_self_signed


def resolve(
    given: Mapping[str, Any], environ: Mapping[str, str], *, uid: int | None = None
) -> tuple[Settings, list[str]]:
    """Returns the settings and the warnings to print.

    :param given: parsed flags
    :raises SettingsError: for an invalid value, an unknown key or an unreadable file.
    """
    flags = dict(given)
    config = flags.pop("config", None) or environ.get("VOLANT_CONFIG")
    values: dict[str, Any] = dict(_default_dirs(environ, os.getuid() if uid is None else uid))
    sources = dict.fromkeys(values, "the default")
    warnings: list[str] = []
    for key, credential in _credentials(environ, warnings).items():
        values[key] = credential
        sources[key] = "systemd's credentials"

    for source, layer in (
        (str(config), _read_file(Path(config)) if config else {}),
        ("the environment", _read_environment(environ, warnings)),
        ("the flags", {key: value for key, value in flags.items() if value is not None}),
    ):
        for key, value in layer.items():
            if value == "" and key in _NEVER_EMPTY:
                raise SettingsError(f"{key} (from {source}) is empty; leave it out or give it a value")
            values[key] = value
            sources[key] = source
    try:
        settings = msgspec.convert(values, Settings, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        key = path.rstrip("`")
        where = f"{key} (from {sources[key]})" if key in sources else "the settings"
        raise SettingsError(f"{where}: {text}") from None
    if config and sources.get("api_key") == str(config) and others_may_read(Path(config)):
        warnings.append(f"every user of this host can read the API key in {config}; chmod 600 it")
    warnings += check(settings).warnings
    return settings, warnings


def protection_of(settings: Settings) -> Protection:
    """Returns the access control for the API. :raises SettingsError: a setting is invalid."""
    try:
        for origin in split(settings.cors_origins):
            check_origin(origin)
        return protection(
            api_key=settings.api_key,
            api_key_file=settings.api_key_file,
            allow_cidr=split(settings.api_allow_cidr),
            trusted_proxies=split(settings.trusted_proxies),
        )
    except ProtectionError as error:
        raise SettingsError(str(error)) from None


def origins_of(settings: Settings) -> Origins:
    """Returns the allowed sources of plugins' artifacts. :raises SettingsError: for an invalid network."""
    try:
        networks = parse_networks(split(settings.artifact_allow_cidr))
    except ValueError as error:
        raise SettingsError(f"artifact_allow_cidr: {error}") from None
    named = [Path(os.path.normpath(directory)) for directory in split(settings.artifact_dirs)]
    # Under both names if the directory is behind a symbolic link.
    return Origins(tuple(dict.fromkeys([*named, *(path.resolve() for path in named)])), networks)


def host_dirs_of(settings: Settings) -> tuple[AllowedDirectory, ...]:
    """Returns the directories of the host that VMs may have. :raises SettingsError: one is malformed."""
    try:
        return tuple(map(parse_allowed, split(settings.host_dirs)))
    except ValueError as error:
        raise SettingsError(f"host_dirs: {error}") from None


def subjects_of(settings: Settings) -> tuple[Subject, ...]:
    """Returns the roles of client certificates. :raises SettingsError: one is malformed or repeated."""
    try:
        subjects = tuple(map(parse_subject, split(settings.tls_subjects)))
        _check_unique(subject.name for subject in subjects)
    except ValueError as error:
        raise SettingsError(f"tls_subjects: {error}") from None
    return subjects


def _check_unique(names: Iterable[str]) -> None:
    """Checks that each name has one role. :raises ValueError: one has two, of which only one could count."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{name[:200]!r} is there more than once; give it one role in one project")


def oidc_of(settings: Settings) -> OidcSettings | None:
    """Returns the settings for tokens; None if no issuer is set. :raises SettingsError: one is missing or invalid."""
    audiences, roles = tuple(split(settings.oidc_audience)), split(settings.oidc_roles)
    secret_file = settings.oidc_client_secret_file
    if secret_file is not None and not (settings.oidc_issuer and settings.oidc_client_id):
        raise SettingsError("oidc_client_secret_file needs oidc_issuer and oidc_client_id, the client that it is of")
    if not settings.oidc_issuer:
        if audiences or roles:
            raise SettingsError("oidc_audience or oidc_roles is set without oidc_issuer; set it too, or remove them")
        return None
    if not is_safe_url(settings.oidc_issuer):
        raise SettingsError(f"oidc_issuer {settings.oidc_issuer[:200]!r} is not a URL with https://")
    if not audiences or not roles:
        raise SettingsError(
            "oidc_issuer needs oidc_audience, the audience of its tokens, and oidc_roles, such as groups=ops:admin"
        )
    try:
        rules = tuple(map(parse_role_rule, roles))
        _check_unique(f"{rule.claim}={rule.pattern}" for rule in rules)
    except ValueError as error:
        raise SettingsError(f"oidc_roles: {error}") from None
    obstacle = oidc_obstacle()
    if obstacle is not None:
        raise SettingsError(f"oidc_issuer is set, but {obstacle}")
    try:
        secret = None if secret_file is None else read_client_secret(secret_file)
    except ProtectionError as error:
        raise SettingsError(str(error)) from None
    return OidcSettings(
        issuer=settings.oidc_issuer,
        audiences=audiences,
        rules=rules,
        name_claim=settings.oidc_name_claim,
        client_id=settings.oidc_client_id or audiences[0],
        client_secret=secret,
        scopes=settings.oidc_scopes,
        # The client of `volar login` alone has no address that browsers could be sent back to.
        browsers=bool(settings.oidc_client_id),
    )


def check(settings: Settings) -> Protection:
    """Checks that the settings fit together. Returns the access control. :raises SettingsError: they don't."""
    protected = protection_of(settings)
    _check_tls(settings)
    oidc = oidc_of(settings)
    for address in split(settings.api_listen_addr):
        if address.startswith("unix:"):
            continue
        host, port = parse_address(address)
        closed = protected.is_any or settings.client_ca is not None or oidc is not None
        if not settings.insecure and not closed and not _is_loopback(host) and not _has_keys(settings):
            raise SettingsError(
                f"api_listen_addr {address}: with neither an API key nor a list of networks only loopback is allowed; "
                "first run `volar keys create` on this host, set VOLANT_API_KEY_FILE or VOLANT_API_ALLOW_CIDR, or pass "
                "--insecure to let everybody who reaches the address control the daemon"
            )
        if not 0 <= port <= 65535:
            raise SettingsError(f"api_listen_addr {address}: {port} is not a port")
    try:
        parse_subnet(settings.subnet)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if settings.bridge and not _INTERFACE.fullmatch(settings.bridge):
        raise SettingsError(
            f"bridge {settings.bridge[:40]!r} is not a valid interface name: use 1 to 14 letters, digits, '-', '_', '.'"
        )
    nameservers = split(settings.nameservers)
    if len(nameservers) > MAX_NAMESERVERS:
        raise SettingsError(f"nameservers has {len(nameservers)} addresses; at most {MAX_NAMESERVERS} are supported")
    for server in nameservers:
        if not is_nameserver(server):
            raise SettingsError(f"nameservers has {server[:40]!r}, which is not an IPv4 address that a guest can reach")
    for directory in split(settings.artifact_dirs):
        if not directory.startswith("/"):
            raise SettingsError(f"artifact_dirs has {directory[:100]!r}, which is not an absolute path")
    origins_of(settings)
    host_dirs_of(settings)
    if not split(settings.api_listen_addr):
        raise SettingsError("api_listen_addr is empty; set it to 127.0.0.1:7777, for example")
    parse_uids(settings.vm_uids)
    _check_fleet(settings)
    for name in _ABSOLUTE:
        path = getattr(settings, name)
        if path is not None and not path.is_absolute():
            raise SettingsError(f"{name} {path} is not an absolute path")
    # A socket's path has at most 108 bytes, and "/vms/<id>/agent.sock" is appended.
    if len(os.fsencode(settings.runtime_dir)) > 70:
        raise SettingsError(f"runtime_dir {settings.runtime_dir} is too long for the sockets in it: at most 70 bytes")
    secret_file = settings.oidc_client_secret_file
    if secret_file is not None and others_may_read(secret_file):
        warning = f"every user of this host can read the secret in {secret_file}; chmod 600 it"
        protected = msgspec.structs.replace(protected, warnings=(*protected.warnings, warning))
    return protected


def _check_tls(settings: Settings) -> None:
    if settings.tls_key is not None and settings.tls_cert is None:
        raise SettingsError("tls_key is set without tls_cert; set both, or neither")
    if settings.tls_self_signed and settings.tls_cert is not None:
        raise SettingsError("tls_self_signed and tls_cert exclude each other; remove one of them")
    if settings.client_ca is not None and not settings.uses_tls:
        raise SettingsError("client_ca is set without TLS; set tls_cert and tls_key as well, or tls_self_signed")
    subjects_of(settings)
    if (settings.client_ca is None) != (not settings.tls_subjects):
        raise SettingsError(
            "client_ca and tls_subjects need each other: client_ca says which client certificates are valid, and "
            'tls_subjects which role each has, as in tls_subjects = ["CN=ci:operator:web"]'
        )


def _check_fleet(settings: Settings) -> None:
    """Checks that either all or none of the fleet's required settings are set. The daemon checks each part."""
    needed = ("fleet_etcd", "fleet_listen", "fleet_cert", "fleet_ca")
    missing = [name for name in needed if not getattr(settings, name)]
    if missing and len(missing) < len(needed):
        given = next(name for name in needed if name not in missing)
        raise SettingsError(f"{given} is set without {missing[0]}; a host of a fleet needs both, others none")


def check_service(settings: Settings, protected: Protection) -> None:
    """Checks the addresses of a service that runs as root: every local user can reach TCP, and control of the daemon is
    control of the host. :raises SettingsError: it listens on TCP without an API key."""
    tcp = [address for address in split(settings.api_listen_addr) if not address.startswith("unix:")]
    closed = protected.keys or settings.client_ca is not None or settings.oidc_issuer
    if tcp and not closed and not settings.insecure and not _has_keys(settings):
        raise SettingsError(
            f"api_listen_addr {tcp[0]}: as a root service volantd listens on TCP only with an API key; run "
            "`volar keys create` while it listens only on its Unix socket, put a key into "
            "/etc/credstore/volant-api-key or set VOLANT_API_KEY_FILE, listen only on a Unix socket "
            "(`systemctl edit volantd.socket`), or set VOLANT_INSECURE=1 to let every user of this host control it"
        )


def _has_keys(settings: Settings) -> bool:
    """Returns whether clients over TCP need one of the keys that administrators have created."""
    return requires_keys(settings.state_dir / "volant.db")


def _decode(kind: type, value: object) -> object:
    if kind is Secret:
        if isinstance(value, str):
            return Secret(value)
        raise msgspec.ValidationError("Expected text")
    if kind is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    raise msgspec.ValidationError(f"Expected a path, got {value!r}")


def memory_overcommit(settings: Settings) -> float:
    """Returns how many times the host's memory may be promised to VMs."""
    return _AUTO_OVERCOMMIT if settings.memory_overcommit == "auto" else settings.memory_overcommit


def shown(settings: Settings) -> dict[str, object]:
    """Returns the settings for JSON, without the API key."""
    found: dict[str, object] = msgspec.to_builtins(settings, enc_hook=str)
    return found | {"api_key": None if settings.api_key is None else "set"}


def split(text: str) -> list[str]:
    """Returns the members of a comma-separated setting."""
    return [member for part in text.split(",") if (member := part.strip())]


def parse_uids(text: str) -> range:
    """Returns the user ids of `FIRST-LAST`. :raises SettingsError: it is malformed, too small or below 1000."""
    first, _, last = (part.strip() for part in text.partition("-"))
    if not (first.isascii() and last.isascii() and first.isdecimal() and last.isdecimal()):
        raise SettingsError(f"vm_uids {text!r} is not FIRST-LAST; for example 65536-98303")
    found = range(int(first), int(last) + 1)
    if len(found) < _LEAST_UIDS or found.start < _FIRST_UID or found.stop > 2**32 - 1:
        raise SettingsError(f"vm_uids {text} must have at least {_LEAST_UIDS} ids between {_FIRST_UID} and {2**32 - 2}")
    return found


def parse_address(address: str) -> tuple[str, int]:
    """Returns host and port of `HOST:PORT` or `[V6]:PORT`. :raises SettingsError: it is neither."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdecimal()):
        raise SettingsError(f"api_listen_addr {address!r} is not HOST:PORT, [IPv6]:PORT or unix:/PATH")
    return host, int(port)


def is_nameserver(text: str) -> bool:
    """Returns whether `text` is an IPv4 address that a guest can reach; the host's loopback is not."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _default_dirs(environ: Mapping[str, str], uid: int) -> dict[str, Path]:
    if uid == 0:
        return {
            "state_dir": Path("/var/lib/volant"),
            "runtime_dir": Path("/run/volant"),
            "cache_dir": Path("/var/cache/volant"),
        }
    home = Path(environ.get("HOME", "/nonexistent"))
    return {
        "state_dir": Path(environ.get("XDG_STATE_HOME") or home / ".local/state") / "volant",
        "runtime_dir": Path(environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}") / "volant",
        "cache_dir": Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "volant",
    }


def _credentials(environ: Mapping[str, str], warnings: list[str]) -> dict[str, Path]:
    """Returns the files that systemd passes, by setting. An existing file that can't be read is an error."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return {}
    found: dict[str, Path] = {}
    for key, name in _CREDENTIALS.items():
        path = Path(directory) / name
        try:
            path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SettingsError(f"systemd's credential {path} can't be read: {error.strerror}") from None
        found[key] = path
    if not found and not Path(directory).exists():
        # Either there is no key, or systemd's mount does not reach this mount namespace.
        warnings.append(f"systemd's credentials directory {directory} does not exist, so no API key is read from it")
    return found


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"the settings file {path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {path} is not TOML: {error}") from None
    for key, value in values.items():
        if key not in Settings.__struct_fields__:
            raise SettingsError(
                f"{path}: there is no setting {key!r}; there are {', '.join(Settings.__struct_fields__)}"
            )
        if isinstance(value, list):
            values[key] = ",".join(str(member) for member in value)
    return values


def _read_environment(environ: Mapping[str, str], warnings: list[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in environ.items():
        if not name.startswith("VOLANT_") or name in _CLIENT_SIDE or name == "VOLANT_CONFIG":
            continue
        key = name.removeprefix("VOLANT_").lower()
        if key not in Settings.__struct_fields__:
            warnings.append(f"{name} is not a setting of this version and does nothing")
        elif value or key in ("allowed_hosts", "cors_origins") or key in _NEVER_EMPTY:
            values[key] = value
    return values
