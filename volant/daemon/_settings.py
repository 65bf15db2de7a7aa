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
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from volant.images import Origins, parse_networks
from volant.model import DEFAULT_SUBNET, parse_subnet

from ._protection import Protection, ProtectionError, Secret, check_origin, others_may_read, protection

_CLIENT_SIDE = {"VOLANT_API_BASE"}
_NEVER_EMPTY = {"api_key", "api_key_file", "api_allow_cidr", "trusted_proxies"}
_CREDENTIAL = "volant-api-key"
_FIRST_UID, _LEAST_UIDS = 1000, 512

MAX_NAMESERVERS = 3
"""The C library's limit (resolv.conf(5))."""
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,13}")
"""Shorter than a tap's name, so that it never is one."""

_AUTO_OVERCOMMIT = 4.0
"""Then each VM has a quarter of what it may still take in reserve."""

DEFAULT_ADDRESS = "127.0.0.1:7777"

RELOADED = ("api_key", "api_key_file", "api_allow_cidr", "trusted_proxies", "allowed_hosts", "cors_origins")
"""Settings that a running daemon reloads on SIGHUP."""


class SettingsError(Exception):
    """A setting is invalid. The text says which one, where it was set, and what would be valid."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Holds all settings of `volantd`; see `resolve`. A field's docstring is its help text."""

    api_listen_addr: str = DEFAULT_ADDRESS
    """Addresses to listen on: `HOST:PORT` or `unix:/PATH`, comma-separated. Port 0 takes a free port."""
    state_dir: Path
    """Directory for what must survive: the database, VM logs and VM disks."""
    runtime_dir: Path
    """Directory for sockets and consoles. At most 70 bytes, as a socket path has 108."""
    cache_dir: Path
    """Directory for what can be built or downloaded again: boot images, artifacts of plugins."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    """`auto`: KVM if a probe shows that it runs guests, else emulation."""
    kernel: Path | None = None
    """Kernel to boot instead of the built image's, for VMs whose plugin has none."""
    initramfs: Path | None = None
    """Initramfs to boot instead of the built image's, for VMs whose plugin has none."""
    max_vms: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Most VMs that can exist. Without it, memory is the limit."""
    memory_overcommit: Annotated[float, msgspec.Meta(ge=1, le=100)] | Literal["auto"] = "auto"
    """How many times the host's memory may be promised to VMs, while enough is free for what they may still take.
    `auto`: 4 times; 1: once, so that all VMs can take all of theirs."""
    return_memory: Literal["on", "off"] = "on"
    """`on`: the host gets back the memory that guests free, from VMs that booted cold; `off`: guests keep it."""
    max_boots: Annotated[int, msgspec.Meta(ge=1, le=10000)] | None = None
    """Most VMs that boot at the same time; others wait. By default two for each CPU."""
    api_key: Secret | None = None
    """API key for clients. Set it in the environment or the file; there is no flag."""
    api_key_file: Path | None = None
    """File with API keys, one a line. By default systemd's credential `volant-api-key`, if there is one."""
    api_allow_cidr: str = ""
    """Networks from which requests are allowed, comma-separated. By default all."""
    trusted_proxies: str = ""
    """Networks of proxies whose `X-Forwarded-For` is trusted, comma-separated."""
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
    """Largest artifact of a plugin."""
    artifact_dirs: str = ""
    """Host directories whose files plugin manifests may name, comma-separated."""
    artifact_allow_cidr: str = ""
    """Private networks from which artifacts of plugins may be downloaded, comma-separated."""
    templates: Literal["auto", "off"] = "auto"
    """`auto`: the daemon makes a template of each kind of VM that booted, and clones further VMs from it."""
    templates_max_mb: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 4096
    """Disk space for all templates. The least recently used ones are removed first."""
    templates_max_age_s: Annotated[float, msgspec.Meta(gt=0, le=10 * 366 * 86400)] = 30 * 86400.0
    """Templates that were not used for this long are removed."""
    standby: Annotated[int, msgspec.Meta(ge=0, le=64)] | Literal["auto"] = "auto"
    """Warm processes for each template that was used lately. A VM claims one instead of starting its own. `auto`: as
    many as recent VMs would have claimed, in a quarter of the free memory; 0: none."""
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
    """`auto`: the daemon gets CPU time before busy VMs; `off`: all get their share."""
    insecure: bool = False
    """Allow other addresses than loopback with neither an API key nor a list of networks."""
    ephemeral: bool = False
    """On a clean stop, delete all VMs and remove the state and runtime directories. For demos and tests."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of log lines."""


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
    credential = _credential(environ, warnings)
    if credential is not None:
        values["api_key_file"] = credential
        sources["api_key_file"] = "systemd's credentials"

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
    """Returns the access control for the API. :raises SettingsError: when a part of it is invalid."""
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
    """Returns where plugins' artifacts may come from. :raises SettingsError: for an invalid network."""
    try:
        networks = parse_networks(split(settings.artifact_allow_cidr))
    except ValueError as error:
        raise SettingsError(f"artifact_allow_cidr: {error}") from None
    named = [Path(os.path.normpath(directory)) for directory in split(settings.artifact_dirs)]
    # Under both names if the directory is behind a symbolic link.
    return Origins(tuple(dict.fromkeys([*named, *(path.resolve() for path in named)])), networks)


def check(settings: Settings) -> Protection:
    """Checks that the settings fit together. Returns the access control. :raises SettingsError: when they don't."""
    protected = protection_of(settings)
    for address in split(settings.api_listen_addr):
        if address.startswith("unix:"):
            continue
        host, port = parse_address(address)
        if not settings.insecure and not protected.is_any and not _is_loopback(host):
            raise SettingsError(
                f"api_listen_addr {address}: with neither an API key nor a list of networks only loopback is allowed; "
                "set VOLANT_API_KEY_FILE or VOLANT_API_ALLOW_CIDR, or pass --insecure to let everybody who reaches "
                "the address control the daemon"
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
    if not split(settings.api_listen_addr):
        raise SettingsError("api_listen_addr is empty; set it to 127.0.0.1:7777, for example")
    parse_uids(settings.vm_uids)
    for name in ("state_dir", "runtime_dir", "cache_dir"):
        if not getattr(settings, name).is_absolute():
            raise SettingsError(f"{name} {getattr(settings, name)} is not an absolute path")
    # A socket's path has at most 108 bytes, and "/vms/<id>/agent.sock" is appended.
    if len(os.fsencode(settings.runtime_dir)) > 70:
        raise SettingsError(f"runtime_dir {settings.runtime_dir} is too long for the sockets in it: at most 70 bytes")
    return protected


def check_service(settings: Settings, protected: Protection) -> None:
    """Checks the addresses of a service that runs as root: every local user can reach TCP, and controlling the daemon
    is controlling the host. :raises SettingsError: when it listens on TCP without an API key."""
    tcp = [address for address in split(settings.api_listen_addr) if not address.startswith("unix:")]
    if tcp and not protected.keys and not settings.insecure:
        raise SettingsError(
            f"api_listen_addr {tcp[0]}: as a root service volantd listens on TCP only with an API key; put one into "
            "/etc/credstore/volant-api-key or set VOLANT_API_KEY_FILE, listen only on a Unix socket "
            "(`systemctl edit volantd.socket`), or set VOLANT_INSECURE=1 to let every user of this host control it"
        )


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
    """Returns the user ids of `FIRST-LAST`. :raises SettingsError: when it is malformed, too small or below 1000."""
    first, _, last = (part.strip() for part in text.partition("-"))
    if not (first.isascii() and last.isascii() and first.isdecimal() and last.isdecimal()):
        raise SettingsError(f"vm_uids {text!r} is not FIRST-LAST; for example 65536-98303")
    found = range(int(first), int(last) + 1)
    if len(found) < _LEAST_UIDS or found.start < _FIRST_UID or found.stop > 2**32 - 1:
        raise SettingsError(f"vm_uids {text} must have at least {_LEAST_UIDS} ids between {_FIRST_UID} and {2**32 - 2}")
    return found


def parse_address(address: str) -> tuple[str, int]:
    """Returns host and port of `HOST:PORT` or `[V6]:PORT`. :raises SettingsError: when it is neither."""
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


def _credential(environ: Mapping[str, str], warnings: list[str]) -> Path | None:
    """Returns the key file that systemd passes. A file that exists and can't be read is an error."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return None
    path = Path(directory) / _CREDENTIAL
    try:
        path.lstat()
    except FileNotFoundError:
        if not Path(directory).exists():
            # Either there is no key, or systemd's mount does not reach this mount namespace.
            warnings.append(
                f"systemd's credentials directory {directory} does not exist, so no API key is read from it"
            )
        return None
    except OSError as error:
        raise SettingsError(f"systemd's credential {path} can't be read: {error.strerror}") from None
    return path


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
