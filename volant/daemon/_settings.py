"""What an operator can set: a TOML file, `VOLANT_*` in the environment, flags; each wins over the one before.

One table, `Settings`, says all of it: the names in the file are the fields, in the environment `VOLANT_` and the field
in capitals, as flags the field with hyphens. An unknown key in the file or a flag is an error, as somebody means
something by it; an unknown `VOLANT_*` is a warning, as it may be meant for another program or version.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import ipaddress
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import msgspec

from volant.images import Origins, parse_networks
from volant.model import DEFAULT_SUBNET, parse_subnet

from ._protection import Protection, ProtectionError, Secret, check_origin, others_may_read, protection

_CLIENT_SIDE = {"VOLANT_API_BASE"}
_NEVER_EMPTY = {"api_key", "api_key_file", "api_allow_cidr", "trusted_proxies"}
_CREDENTIAL = "volant-api-key"
_FIRST_UID, _LEAST_UIDS = 1000, 512

MAX_NAMESERVERS = 3
"""The C library heeds no more."""
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,13}")
"""Shorter than the name of a tap."""

DEFAULT_ADDRESS = "127.0.0.1:7777"

RELOADED = ("api_key", "api_key_file", "api_allow_cidr", "trusted_proxies", "allowed_hosts", "cors_origins")
"""What a running daemon takes anew from its settings."""


class SettingsError(Exception):
    """A setting that can't be used. The text says which, where it was set, and what would be right."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of `volantd`, with their defaults for an ordinary user; see `load`."""

    api_listen_addr: str = DEFAULT_ADDRESS
    """Where to listen: `HOST:PORT` or `unix:/PATH`, comma-separated. Port 0 takes a free one."""
    state_dir: Path
    """What must survive: the database, VM logs, VMs' disks."""
    runtime_dir: Path
    """What lives as long as the VMs: sockets, consoles. Short, as a socket's path has 108 bytes."""
    cache_dir: Path
    """What can be made or fetched again: boot images, boot artifacts of plugins."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    """`auto`: KVM where a probe shows that it runs guests, else emulation."""
    kernel: Path | None = None
    """Boot this kernel instead of the built image's, for VMs whose plugin brings none."""
    initramfs: Path | None = None
    """Boot this initramfs instead of the built image's, for VMs whose plugin brings none."""
    max_vms: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Refuse to create more; without it memory decides."""
    return_memory: Literal["on", "off"] = "on"
    """`on`: what guests free goes back to the host, for VMs that booted cold; `off`: a guest keeps what it has."""
    max_boots: Annotated[int, msgspec.Meta(ge=1, le=10000)] | None = None
    """How many VMs boot at a time, the others wait for their turn; by default two for each CPU."""
    api_key: Secret | None = None
    """A key that clients must show. In the environment or the file alone, never a flag."""
    api_key_file: Path | None = None
    """A file with such keys, one a line; by default systemd's credential `volant-api-key`, if there is one."""
    api_allow_cidr: str = ""
    """Networks from which requests are taken, comma-separated; without it from all."""
    trusted_proxies: str = ""
    """Networks of proxies whose `X-Forwarded-For` counts, comma-separated."""
    allowed_hosts: str = ""
    """Further names under which clients reach the daemon, comma-separated; see the reference on `Host`."""
    cors_origins: str = ""
    """Origins of web pages that may use the API, comma-separated."""
    agent_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 120.0
    """How long a boot may take from its launch to the agent's first answer."""
    image_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 300.0
    """How long building a boot image may take."""
    artifact_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 1800.0
    """How long one boot artifact of a plugin may take to arrive."""
    artifact_max_mb: Annotated[int, msgspec.Meta(gt=0, le=2**24)] = 16384
    """How large one may be."""
    artifact_dirs: str = ""
    """Directories of this host, comma-separated, whose files whoever may install plugins may name in manifests."""
    artifact_allow_cidr: str = ""
    """Networks that are not public, and from whose servers files of plugins may be fetched, comma-separated."""
    templates: Literal["auto", "off"] = "auto"
    """`auto`: what has booted once is made a template, and further VMs of its kind are clones of it."""
    templates_max_mb: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 4096
    """How large all templates together may be; those that were not used for the longest time go."""
    templates_max_age_s: Annotated[float, msgspec.Meta(gt=0, le=10 * 366 * 86400)] = 30 * 86400.0
    """A template that was not used for so long goes."""
    standby: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """How many processes wait, all but running, for the next VMs of each template that was used lately."""
    standby_max_mb: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 2048
    """How much memory the guests of all that wait may have together."""
    standby_idle_s: Annotated[float, msgspec.Meta(gt=0, le=366 * 86400)] = 600.0
    """A template that was not used for so long has none that wait."""
    network: Literal["auto", "none", "bridge", "user"] = "auto"
    """The network of VMs that are created without a word of their own; `auto`: the best that can be had, `bridge`, else
    `user`, else `none`."""
    bridge: str = ""
    """The name of the bridge; by default one that carries a digest of the state directory."""
    subnet: str = str(DEFAULT_SUBNET)
    """The subnet on the bridge, from which VMs have their addresses."""
    nameservers: str = ""
    """Whom guests with a NIC ask for names, IPv4 addresses, comma-separated; by default whom the host asks."""
    sandbox: Literal["auto", "off"] = "auto"
    """Sandbox for hypervisors. `auto`: every layer that this host supports; `off`: only QEMU's own `-sandbox`."""
    vm_uids: str = "65536-98303"
    """Users and groups for hypervisors, which nobody else has: the first and the last."""
    cpu_priority: Literal["auto", "off"] = "auto"
    """`auto`: the daemon gets processors before busy VMs do; `off`: all get their share."""
    insecure: bool = False
    """Listen on other addresses than loopback with neither an API key nor a list of networks."""
    ephemeral: bool = False
    """On a clean stop delete all VMs and remove state and runtime directories. For demos and tests."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe lines that are logged."""


GROUPS = {
    "who may use the API": (
        *("api_listen_addr", "api_key_file", "api_allow_cidr", "trusted_proxies", "allowed_hosts", "cors_origins"),
        "insecure",
    ),
    "directories": ("state_dir", "runtime_dir", "cache_dir"),
    "VMs": (
        *("accelerator", "kernel", "initramfs", "max_vms", "max_boots", "return_memory", "sandbox", "vm_uids"),
        *("agent_timeout_s", "image_timeout_s", "artifact_timeout_s", "artifact_max_mb"),
        *("artifact_dirs", "artifact_allow_cidr"),
    ),
    "fast starts": (
        *("templates", "templates_max_mb", "templates_max_age_s", "standby", "standby_max_mb", "standby_idle_s"),
    ),
    "networks": ("network", "bridge", "subnet", "nameservers"),
    "the daemon": ("cpu_priority", "ephemeral", "log_level"),
}
"""The settings that are flags, as `volantd --help` lists them. `api_key` is none: every user of a host can read the
arguments of its processes."""


def load(argv: Sequence[str], environ: Mapping[str, str], *, uid: int | None = None) -> tuple[Settings, list[str]]:
    """The settings and the warnings to print.

    :raises SettingsError: a value that does not fit, an unknown key, a file that can't be read.
    :raises SystemExit: for `--help`, `--version` and malformed flags, as argparse does.
    """
    return resolve(vars(_parser().parse_args(argv)), environ, uid=uid)


def resolve(
    given: Mapping[str, Any], environ: Mapping[str, str], *, uid: int | None = None
) -> tuple[Settings, list[str]]:
    """Likewise, of flags that are parsed already. :raises SettingsError: see `load`."""
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
                raise SettingsError(f"{key} (from {source}) is empty; leave it out, or say what it should be")
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
    """What the settings let stand between clients and the API. :raises SettingsError:"""
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
    """From where the files of plugins may come. :raises SettingsError:"""
    try:
        networks = parse_networks(split(settings.artifact_allow_cidr))
    except ValueError as error:
        raise SettingsError(f"artifact_allow_cidr: {error}") from None
    named = [Path(os.path.normpath(directory)) for directory in split(settings.artifact_dirs)]
    # By both names, where a directory lies behind a link.
    return Origins(tuple(dict.fromkeys([*named, *(path.resolve() for path in named)])), networks)


def check(settings: Settings) -> Protection:
    """Whether the settings fit together. :raises SettingsError: they don't."""
    protected = protection_of(settings)
    for address in split(settings.api_listen_addr):
        if address.startswith("unix:"):
            continue
        host, port = parse_address(address)
        if not settings.insecure and not protected.is_any and not _is_loopback(host):
            raise SettingsError(
                f"api_listen_addr {address}: with neither an API key nor a list of networks only loopback is listened "
                "on; set VOLANT_API_KEY_FILE or VOLANT_API_ALLOW_CIDR, or say --insecure if everybody who reaches it "
                "may command it"
            )
        if not 0 <= port <= 65535:
            raise SettingsError(f"api_listen_addr {address}: {port} is no port")
    try:
        parse_subnet(settings.subnet)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if settings.bridge and not _INTERFACE.fullmatch(settings.bridge):
        raise SettingsError(
            f"bridge {settings.bridge[:40]!r} is no name of a network interface: 1 to 14 letters, digits, '-', '_', '.'"
        )
    nameservers = split(settings.nameservers)
    if len(nameservers) > MAX_NAMESERVERS:
        raise SettingsError(f"nameservers has {len(nameservers)} members, at most {MAX_NAMESERVERS} are heeded")
    for server in nameservers:
        if not is_nameserver(server):
            raise SettingsError(f"nameservers has {server[:40]!r}, which is no IPv4 address that a guest can ask")
    for directory in split(settings.artifact_dirs):
        if not directory.startswith("/"):
            raise SettingsError(f"artifact_dirs has {directory[:100]!r}, which is not an absolute path")
    origins_of(settings)
    if not split(settings.api_listen_addr):
        raise SettingsError("api_listen_addr is empty; write for instance 127.0.0.1:7777")
    parse_uids(settings.vm_uids)
    for name in ("state_dir", "runtime_dir", "cache_dir"):
        if not getattr(settings, name).is_absolute():
            raise SettingsError(f"{name} {getattr(settings, name)} is not an absolute path")
    # 108 bytes for a socket's path, of which "/vms/<id>/agent.sock" takes its share.
    if len(os.fsencode(settings.runtime_dir)) > 70:
        raise SettingsError(f"runtime_dir {settings.runtime_dir} is too long for the sockets in it: at most 70 bytes")
    return protected


def check_service(settings: Settings, protected: Protection) -> None:
    """Whether a service that runs as root may listen where the settings say: every local user can reach TCP, and who
    commands it commands the host. :raises SettingsError:"""
    tcp = [address for address in split(settings.api_listen_addr) if not address.startswith("unix:")]
    if tcp and not protected.keys and not settings.insecure:
        raise SettingsError(
            f"api_listen_addr {tcp[0]}: as a service of root volantd listens on TCP only with an API key; put one into "
            "/etc/credstore/volant-api-key or name a file with VOLANT_API_KEY_FILE, listen on a Unix socket alone "
            "(`systemctl edit volantd.socket`), or set VOLANT_INSECURE=1 if every user of this host may command it"
        )


def _decode(kind: type, value: object) -> object:
    if kind is Secret:
        if isinstance(value, str):
            return Secret(value)
        raise msgspec.ValidationError("Expected text")
    if kind is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    raise msgspec.ValidationError(f"Expected a path, got {value!r}")


def shown(settings: Settings) -> dict[str, object]:
    """What they are, ready for JSON; of a key only that there is one."""
    found: dict[str, object] = msgspec.to_builtins(settings, enc_hook=str)
    return found | {"api_key": None if settings.api_key is None else "set"}


def split(text: str) -> list[str]:
    """The members of a comma-separated setting."""
    return [member for part in text.split(",") if (member := part.strip())]


def parse_uids(text: str) -> range:
    """Users of `FIRST-LAST`. :raises SettingsError: it is not that, or they are others' already."""
    first, _, last = (part.strip() for part in text.partition("-"))
    if not (first.isascii() and last.isascii() and first.isdecimal() and last.isdecimal()):
        raise SettingsError(f"vm_uids {text!r} is not FIRST-LAST, as 65536-98303")
    found = range(int(first), int(last) + 1)
    if len(found) < _LEAST_UIDS or found.start < _FIRST_UID or found.stop > 2**32 - 1:
        raise SettingsError(f"vm_uids {text}: at least {_LEAST_UIDS} numbers, from {_FIRST_UID} to {2**32 - 2}")
    return found


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[V6]:PORT`. :raises SettingsError: when it is neither."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdecimal()):
        raise SettingsError(f"api_listen_addr {address!r} is not HOST:PORT, [IPv6]:PORT or unix:/PATH")
    return host, int(port)


def is_nameserver(text: str) -> bool:
    """Whether it is an IPv4 address at which a guest may find somebody: the host's loopback is not its own."""
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
    """The key file that systemd hands in. One that is there and can't be looked at is an error, not none."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return None
    path = Path(directory) / _CREDENTIAL
    try:
        path.lstat()
    except FileNotFoundError:
        if not Path(directory).exists():
            # Not for want of a key alone: so it is, too, where what systemd has mounted there does not arrive here.
            warnings.append(f"there is no {directory}, where systemd hands keys in; none is taken from there")
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


class Command(NamedTuple):
    """What follows `volantd`."""

    name: Literal["run", "check", "restore"]
    flags: dict[str, Any]
    """Those of the settings that were given, for `resolve`."""
    file: Path | None = None
    """The backup to restore."""
    replace: bool = False


def parse_command(argv: Sequence[str]) -> Command:
    """The sub-command, and the flags before and after it. :raises SystemExit: see `load`; nothing was done."""
    parser = _parser()
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    words: dict[str, Any] = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    check = commands.add_parser(
        "check", help="report, as JSON, whether VMs can run on this host", description="Report on this host, as JSON.",
        **words,
    )  # fmt: skip
    restore = commands.add_parser(
        "restore", help="put a backup in the place of the database",
        description="Put a backup in the place of the database, while no volantd runs. The database that is there is "
        "kept beside it, also when it is damaged. VMs that run go on. Takes all settings of volantd besides.",
        **words,
    )  # fmt: skip
    restore.add_argument("file", type=Path, metavar="BACKUP", help="what `volar system backup` has written")
    restore.add_argument("--replace", action="store_true", help="also when there are VMs that the backup does not know")
    for each in (check, restore):
        # Without defaults: those would hide what stands before the sub-command.
        _add_settings(each)
    flags = vars(parser.parse_args(argv))
    name: Literal["run", "check", "restore"] = flags.pop("command") or "run"
    return Command(name, flags, flags.pop("file", None), flags.pop("replace", False))


def _parser() -> argparse.ArgumentParser:
    from volant import __version__

    parser = argparse.ArgumentParser(
        prog="volantd",
        description="The daemon that boots VMs, keeps them, and lets clients reach inside.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"volantd {__version__}")
    _add_settings(parser)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="Settings in TOML; flags and VOLANT_* variables win over it.")
    hints = get_type_hints(Settings)
    # Only a reader of --help needs them, and they cost a look into this file.
    texts = _descriptions() if {"-h", "--help"} & set(sys.argv) else {}
    for title, fields in GROUPS.items():
        group = parser.add_argument_group(title)
        for field in fields:
            names = [f"--{field.replace('_', '-')}"]
            if field == "api_listen_addr":
                names.insert(0, "--listen")
            text = texts.get(field)
            if hints[field] is bool:
                group.add_argument(*names, dest=field, action="store_true", help=text)
            else:
                group.add_argument(*names, dest=field, metavar=_metavar(field, hints[field]), help=text)


def _metavar(field: str, hint: Any) -> str:
    """Returns what stands for the value of a flag in the help."""
    kinds = [member for member in get_args(hint) if member is not type(None)] or [hint]
    if all(isinstance(kind, str) for kind in kinds):
        return "|".join(kinds)
    if kinds[0] is Path:
        return "PATH"
    if kinds[0] in (int, float):
        return "SECONDS" if field.endswith("_s") else "MIB" if field.endswith("_mb") else "N"
    return "TEXT"


def _descriptions() -> dict[str, str]:
    """Returns the documentation of each setting, with its default: what stands below the field in `Settings`."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(Settings))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, text in pairwise(node.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            says = text.value if isinstance(text, ast.Expr) else None
            if isinstance(says, ast.Constant) and isinstance(says.value, str):
                default = ast.literal_eval(field.value) if isinstance(field.value, ast.Constant) else None
                shown = f" Default: {default}." if default not in (None, "", False) else ""
                # argparse expands percent signs.
                found[field.target.id] = (" ".join(says.value.split()) + shown).replace("%", "%%")
    return found
