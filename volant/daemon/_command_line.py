"""Parses the command line of `volantd`, and writes its help from `Settings`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import msgspec

from volant.model.docstrings import member_texts

from ._settings import Settings, resolve

GROUPS = {
    "API access": (
        *("api_listen_addr", "api_key_file", "api_allow_cidr", "trusted_proxies", "allowed_hosts", "cors_origins"),
        *(
            "tls_cert",
            "tls_key",
            "tls_self_signed",
            "client_ca",
            "tls_subjects",
            "oidc_issuer",
            "oidc_audience",
            "oidc_roles",
            "oidc_name_claim",
            "oidc_client_id",
            "oidc_client_secret_file",
            "oidc_scopes",
            "insecure",
        ),
        *("key_requests_per_s", "key_requests_at_once", "key_body_kb"),
    ),
    "directories": ("state_dir", "runtime_dir", "cache_dir"),
    "VMs": (
        *("accelerator", "kernel", "initramfs", "max_vms", "max_boots", "sandbox", "vm_uids"),
        *("memory_overcommit", "return_memory"),
        *("agent_timeout_s", "image_timeout_s", "artifact_timeout_s", "artifact_max_mb"),
        *("artifact_dirs", "artifact_allow_cidr", "host_dirs", "secrets_key_file"),
    ),
    "OCI images": (
        *("oci_cache_max_mb", "oci_max_mb", "oci_timeout_s", "oci_stall_timeout_s"),
        *("oci_plain_http", "oci_ca_dir", "oci_auth_file"),
    ),
    "snapshots in registries": ("transfer_mbps", "transfer_max_mb", "transfer_timeout_s"),
    "fast starts": (
        *("templates", "templates_max_mb", "templates_max_age_s", "standby", "standby_max_mb", "standby_idle_s"),
    ),
    "networks": ("network", "bridge", "subnet", "nameservers"),
    "fleet": (
        *("fleet_etcd", "fleet_host", "fleet_listen", "fleet_address", "fleet_cert", "fleet_key", "fleet_ca"),
        *("fleet_etcd_user", "fleet_etcd_password_file", "fleet_prefix", "fleet_zone", "fleet_labels", "fleet_ttl_s"),
    ),
    "daemon": ("cpu_priority", "ephemeral", "audit_max_records", "audit_max_age_s", "log_level"),
}
"""The settings with flags, in the groups of `volantd --help`. `api_key` has no flag: every user of the host can read
the arguments of its processes."""


def load(argv: Sequence[str], environ: Mapping[str, str], *, uid: int | None = None) -> tuple[Settings, list[str]]:
    """Returns the settings and the warnings to print.

    :raises SettingsError: see `resolve`.
    :raises SystemExit: for `--help`, `--version` and malformed flags, like argparse.
    """
    return resolve(vars(_parser().parse_args(argv)), environ, uid=uid)


class Command(NamedTuple):
    """The parsed command line."""

    name: Literal["run", "check", "check-fleet", "restore"]
    flags: dict[str, Any]
    """The settings given as flags, for `resolve`."""
    file: Path | None = None
    """The backup to restore."""
    replace: bool = False


def parse_command(argv: Sequence[str]) -> Command:
    """Parses the sub-command and the flags before and after it. :raises SystemExit: see `load`."""
    parser = _parser()
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    words: dict[str, Any] = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    check = commands.add_parser(
        "check", help="report as JSON whether VMs can run on this host", description="Report on this host as JSON.",
        **words,
    )  # fmt: skip
    fleet = commands.add_parser(
        "check-fleet", help="report as JSON whether this host can be one of its fleet",
        description="Check certificates, etcd and the name of this host, and change nothing.", **words,
    )  # fmt: skip
    restore = commands.add_parser(
        "restore", help="replace the database with a backup",
        description="Replace the database with a backup while volantd is stopped. The old database is kept beside the "
        "new one, even when it is damaged. VMs keep running. Accepts all settings of volantd.",
        **words,
    )  # fmt: skip
    restore.add_argument("file", type=Path, metavar="BACKUP", help="file that `volar system backup` wrote")
    restore.add_argument("--replace", action="store_true", help="restore even if the backup lacks VMs that exist now")
    for each in (check, fleet, restore):
        # Without defaults, which would override the flags before the sub-command.
        _add_settings(each)
    flags = vars(parser.parse_args(argv))
    name: Literal["run", "check", "check-fleet", "restore"] = flags.pop("command") or "run"
    return Command(name, flags, flags.pop("file", None), flags.pop("replace", False))


def _parser() -> argparse.ArgumentParser:
    from volant import __version__

    parser = argparse.ArgumentParser(
        prog="volantd",
        description="The daemon that runs VMs and gives clients access to them.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"volantd {__version__}")
    _add_settings(parser)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="Settings in TOML. Flags and VOLANT_* variables override it.")
    hints = _hints()
    # Only --help needs them, and they cost parsing this file.
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


@cache
def _hints() -> dict[str, Any]:
    """Returns the type of each setting, once for the three parsers."""
    return get_type_hints(Settings)


def _metavar(field: str, hint: Any) -> str:
    """Returns the placeholder for a flag's value in the help."""
    kinds = [member for member in get_args(hint) if member is not type(None)] or [hint]
    if all(isinstance(kind, str) for kind in kinds):
        return "|".join(kinds)
    if kinds[0] is Path:
        return "PATH"
    if kinds[0] in (int, float):
        return "SECONDS" if field.endswith("_s") else "MIB" if field.endswith("_mb") else "N"
    return "TEXT"


def _descriptions() -> dict[str, str]:
    """Returns the docstring of each member of `Settings`, with its default."""
    texts, found = member_texts(Settings) or {}, {}
    for field in msgspec.structs.fields(Settings):
        is_plain = isinstance(field.default, str | int | float) and field.default not in ("", False)
        shown = f" Default: {field.default}." if is_plain else ""
        # argparse expands percent signs.
        found[field.name] = (texts.get(field.name, "") + shown).replace("%", "%%")
    return found
