"""Checks the rows of a database before the daemon uses them.

A backup is not trusted. Members of its rows become paths, arguments of programs and ids of processes to signal. A row
is refused unless each such member has the form that volantd gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from ._api_key import ApiKey
from ._caller import Role
from ._egress import Egress, parse_egress
from ._manifest import BASE, Manifest
from ._network import KINDS, Lease, Network, PublishedPort, kind_of
from ._problem import Problem
from ._row import MAX_DISK_MB, VmRow
from ._secret import MAX_SECRET_BYTES, MAX_SECRETS_OF_VM, Secret, is_secret_path
from ._snapshot import Snapshot
from ._text import check_plain, is_name
from ._volume import (
    MAX_VOLUME_MB,
    MAX_VOLUMES,
    DirectoryMount,
    Volume,
    VolumeMount,
    is_short_path,
    is_volume_path,
)

MAX_ID = 10**15
"""Maximum for ids and counters, far above any real value and far below SQLite's limit."""
_LAYER = re.compile(r"([1-9][0-9]{0,17})-[A-Za-z0-9][A-Za-z0-9.]{0,63}\Z")
_TAG = re.compile(r"volant-[0-9a-z]{1,32}-(?:([1-9][0-9]{0,17})\.[1-9][0-9]{0,17}|s\.[0-9a-f]{1,32})\Z")
_IMAGE = re.compile(r"(?:[0-9a-f]{64}|custom)\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_IMAGE_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_TEMPLATE = re.compile(r"(?:[0-9a-f]{32}|(?:fork|snapshot)-[0-9A-Za-z-]{1,64})\Z")
_CHECKPOINT = re.compile(r"(?:fork|snapshot)-[0-9A-Za-z-]{1,64}\Z")
_SNAPSHOT_ID = re.compile(r"[0-9A-Za-z-]{1,64}\Z")
_VOLUME_ID = re.compile(r"[0-9a-f]{16}\Z")
_SECRET_KEY_ID = re.compile(r"[0-9a-f]{8}\Z")
_SEAL_BYTES = 64
"""The most bytes that encryption adds: more than a nonce and a tag."""
_KEY_ID = re.compile(r"[0-9a-f]{32}\Z")
_SOCKET = re.compile(r"/[^\x00-\x1f\x7f]{1,4095}\Z")
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}\Z")
_TAP = re.compile(r"(?:v[0-9a-z]{14})?\Z")
_BOOT_ID = re.compile(r"[0-9a-f-]{1,64}\Z")
_EPOCH = re.compile(r"[0-9A-Za-z]{1,32}\Z")
_SHOWN = 80


class BadMember(Exception):
    """A member of a stored row that volantd can't have written. The text names it, its value and the problem."""

    def __init__(self, member: str, value: object, why: str) -> None:
        text = repr(value)
        shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
        super().__init__(f"{member} is {shown}, {why}")
        self.member = member


def check_stored_vm(row: VmRow) -> None:
    """Checks a VM. :raises BadMember: a path, a process, a device or an argument has a form that volantd does not
    use."""
    if not 1 <= row.id <= MAX_ID:
        raise BadMember("id", row.id, f"and ids are from 1 to {MAX_ID}")
    for member in ("name", "project", "plugin", "runtime", "network"):
        _name(member, getattr(row, member))
    check_stored_manifest(row.manifest, "manifest.")
    if row.layer:
        found = _LAYER.match(row.layer)
        if found is None or int(found[1]) != row.id:
            raise BadMember("layer", row.layer, f"and this VM's disk is named '{row.id}-...', without '/'")
    if row.tag:
        found = _TAG.match(row.tag)
        if found is None or (found[1] is not None and int(found[1]) != row.id):
            raise BadMember("tag", row.tag, "which is no process tag of this VM")
    _process(row)
    _text("serial_socket", row.serial_socket, _SOCKET, "which is no absolute path")
    if row.serial_socket is not None and not row.serial_socket.endswith(f"/vms/{row.id}/console.sock"):
        raise BadMember("serial_socket", row.serial_socket, "which is not the console of this VM")
    _text("image", row.image, _IMAGE, "which is no digest of an image")
    _text("template", row.template, _TEMPLATE, "which is no digest of a template and no name of a checkpoint")
    _text("checkpoint", row.checkpoint, _CHECKPOINT, "which is no name of a checkpoint")
    _text("disk_from", row.disk_from, _CHECKPOINT, "which is no name of a checkpoint")
    if row.hypervisor is not None:
        _name("hypervisor", row.hypervisor)
    _plain("kernel_cmdline", row.kernel_cmdline)
    for member, low, high in (
        ("cpu_cores", 1, 4096), ("memory_mb", 1, 2**30), ("disk_mb", 1, MAX_DISK_MB), ("boots", 0, MAX_ID),
        ("booted", 0, MAX_ID), ("generation", 0, MAX_ID), ("restarts", 0, MAX_ID), ("found_boot", 0, MAX_ID),
        ("revision", 0, MAX_ID), ("grace_s", 0, 10**9), ("disk_iops", 1, MAX_ID), ("disk_mbps", 1, MAX_ID),
    ):  # fmt: skip
        number = getattr(row, member)
        if number is not None and not low <= number <= high:
            raise BadMember(member, number, f"and from {low} to {high} is possible")
    for member in ("created_at", "updated_at", "expires_at", "started_at"):
        check_stored_time(member, getattr(row, member))
    if row.lease is not None:
        _lease(row.lease, kind_of(row.network) not in ("none", "user"))
    for number, port in enumerate(row.ports):
        _port(f"ports[{number}]", port)
    check_stored_egress(row.egress)
    if (mounts := len(row.volumes) + len(row.directories)) > MAX_VOLUMES:
        raise BadMember("volumes", mounts, f"and a VM has at most {MAX_VOLUMES}")
    if (count := len(row.secret_env) + len(row.secrets)) > MAX_SECRETS_OF_VM:
        raise BadMember("secrets", count, f"and a VM has at most {MAX_SECRETS_OF_VM}")
    for variable, secret in row.secret_env.items():
        _name(f"secret_env.{variable[:80]}", secret)
    if row.registry_secret is not None:
        _name("registry_secret", row.registry_secret)
    for number, file in enumerate(row.secrets):
        _name(f"secrets[{number}].name", file.name)
        if not is_secret_path(file.path):
            raise BadMember(f"secrets[{number}].path", file.path, "where no secret can be")
    for number, mount in enumerate(row.volumes):
        _mount(f"volumes[{number}]", mount)
    for number, directory in enumerate(row.directories):
        _directory(f"directories[{number}]", directory)


def check_stored_snapshot(snapshot: Snapshot) -> None:
    """Checks a snapshot. :raises BadMember: see `check_stored_vm`."""
    _text("id", snapshot.id, _SNAPSHOT_ID, "which is no id of a snapshot: letters, digits and hyphens")
    _name("name", snapshot.name)
    check_stored_time("created_at", snapshot.created_at)
    try:
        check_stored_vm(snapshot.vm)
    except BadMember as bad:
        bad.args = (f"vm.{bad}",)
        raise


def check_stored_network(network: Network) -> None:
    """Checks a network. :raises BadMember: see `check_stored_vm`."""
    _name("name", network.name)
    _name("project", network.project)
    if network.name in KINDS:
        raise BadMember("name", network.name, "which is a kind of network")
    check_stored_time("created_at", network.created_at)


def check_stored_volume(volume: Volume) -> None:
    """Checks a volume. :raises BadMember: see `check_stored_vm`."""
    _text("id", volume.id, _VOLUME_ID, "which is no id of a volume")
    _text("source", volume.source, _VOLUME_ID, "which is no id of a volume")
    _name("name", volume.name)
    _name("project", volume.project)
    if not 1 <= volume.size_mb <= MAX_VOLUME_MB:
        raise BadMember("size_mb", volume.size_mb, f"and from 1 to {MAX_VOLUME_MB} is possible")
    if not 0 <= volume.writers <= MAX_ID:
        raise BadMember("writers", volume.writers, "which is no count")
    check_stored_time("created_at", volume.created_at)


def check_stored_secret(secret: Secret) -> None:
    """Checks a secret. :raises BadMember: see `check_stored_vm`."""
    _name("name", secret.name)
    _name("project", secret.project)
    _text("key_id", secret.key_id, _SECRET_KEY_ID, "which is no id of a key")
    if not 1 <= secret.version <= MAX_ID:
        raise BadMember("version", secret.version, "which is no version")
    if len(secret.sealed) > MAX_SECRET_BYTES + _SEAL_BYTES:
        raise BadMember("sealed", len(secret.sealed), "bytes, which are more than a secret has")
    check_stored_time("created_at", secret.created_at)
    check_stored_time("updated_at", secret.updated_at)


def check_stored_key(key: ApiKey) -> None:
    """Checks an API key. :raises BadMember: see `check_stored_vm`."""
    _text("digest", key.digest, _SHA256, "which is no SHA-256")
    _text("id", key.id, _KEY_ID, "which is no id of a key")
    _name("name", key.name)
    if (key.project is None) != (key.role is Role.ADMIN):
        raise BadMember("project", key.project, "and every key has one but an administrator's")
    if key.project is not None:
        _name("project", key.project)
    _plain("created_by", key.created_by)
    check_stored_time("created_at", key.created_at)
    check_stored_time("expires_at", key.expires_at)
    if key.used is not None:
        _plain("used.address", key.used.address)
        check_stored_time("used.at", key.used.at)


def check_stored_manifest(manifest: Manifest, prefix: str = "") -> None:
    """Checks the members that become paths. :raises BadMember: one is not safe."""
    _name(f"{prefix}name", manifest.name)
    _name(f"{prefix}runtime", manifest.runtime)
    boot = manifest.boot
    for part in ("kernel", "initramfs", "rootfs"):
        artifact = getattr(boot, part, None)
        if artifact is not None:
            _text(f"{prefix}boot.{part}.sha256", artifact.sha256, _SHA256, "which is no SHA-256")
            _plain(f"{prefix}boot.{part}.url", artifact.url)
    if boot is not None and boot.image is not None:
        _text(f"{prefix}boot.image.digest", boot.image.digest, _IMAGE_DIGEST, "which is no digest of an image")
        _plain(f"{prefix}boot.image.reference", boot.image.reference)


def check_stored_plugin(manifest: Manifest) -> None:
    """Checks a stored plugin, which must not replace the built-in one. :raises BadMember: see
    `check_stored_manifest`."""
    check_stored_manifest(manifest)
    if manifest.name == BASE.name:
        raise BadMember("name", manifest.name, "which is the plugin that is built in")


def check_stored_epoch(epoch: object) -> str:
    """Returns the epoch, which is part of file names. :raises BadMember: it is malformed."""
    if not isinstance(epoch, str) or _EPOCH.match(epoch) is None:
        raise BadMember("value", epoch, "which is no epoch of events")
    return epoch


def check_stored_time(member: str, at: datetime | None) -> None:
    """Checks a time. :raises BadMember: it has no time zone."""
    if at is not None and at.tzinfo is None:
        raise BadMember(member, at.isoformat(), "which has no time zone")


def check_addresses_differ(rows: Iterable[VmRow]) -> None:
    """Checks that no two VMs on the bridge have the same address. :raises BadMember: two do."""
    owners: dict[str, VmRow] = {}
    for row in rows:
        if row.lease is not None and row.lease.tap:
            other = owners.setdefault(row.lease.address, row)
            if other is not row:
                raise BadMember("lease.address", row.lease.address, f"of VM {other.id} as well as of VM {row.id}")


def _process(row: VmRow) -> None:
    process = row.process
    if process is None:
        return
    if process.tag != row.tag or not row.tag:
        raise BadMember("process.tag", process.tag, "which is not the process tag of the VM")
    if process.pid <= 1 or process.start_time < 0:
        raise BadMember("process.pid", process.pid, "which is no process of a VM")
    _text("process.boot_id", process.boot_id, _BOOT_ID, "which is no boot of a host")


def _lease(lease: Lease, on_bridge: bool) -> None:
    for member in ("address", "gateway"):
        try:
            IPv4Address(getattr(lease, member))
        except (AddressValueError, ValueError):
            raise BadMember(f"lease.{member}", getattr(lease, member), "which is no IPv4 address") from None
    if lease.address == lease.gateway:
        raise BadMember("lease.address", lease.address, "which is the gateway's")
    if not 1 <= lease.prefix <= 32:
        raise BadMember("lease.prefix", lease.prefix, "and from 1 to 32 is possible")
    if lease.address6:
        try:
            IPv6Address(lease.address6)
        except (AddressValueError, ValueError):
            raise BadMember("lease.address6", lease.address6, "which is no IPv6 address") from None
    _text("lease.mac", lease.mac, _MAC, "which is no MAC address")
    _text("lease.tap", lease.tap, _TAP, "which is no name of a tap of ours")
    if lease.tap and not on_bridge:
        raise BadMember("lease.tap", lease.tap, "and the VM is not on the bridge")


def _port(member: str, port: PublishedPort) -> None:
    try:
        IPv4Address(port.host)
    except (AddressValueError, ValueError):
        raise BadMember(f"{member}.host", port.host, "which is no IPv4 address") from None
    for name in ("host_port", "guest_port"):
        if not 1 <= getattr(port, name) <= 65535:
            raise BadMember(f"{member}.{name}", getattr(port, name), "which is no port")


def check_stored_egress(egress: Egress) -> None:
    """Checks members that become firewall rules. :raises BadMember: one is malformed."""
    try:
        if parse_egress(egress) == egress:
            return
    except Problem as problem:
        raise BadMember(problem.field or "egress", egress, problem.detail) from None
    raise BadMember("egress", egress, "which is not how volantd writes it")


def _directory(member: str, mount: DirectoryMount) -> None:
    if not is_short_path(mount.source):
        raise BadMember(f"{member}.source", mount.source, "which is no absolute path in its shortest form")
    if not is_volume_path(mount.path):
        raise BadMember(f"{member}.path", mount.path, "where no directory can be mounted")


def _mount(member: str, mount: VolumeMount) -> None:
    _name(f"{member}.name", mount.name)
    _text(f"{member}.id", mount.id, _VOLUME_ID, "which is no id of a volume")
    if not is_volume_path(mount.path):
        raise BadMember(f"{member}.path", mount.path, "where no volume can be mounted")
    if not 0 <= mount.writers <= MAX_ID:
        raise BadMember(f"{member}.writers", mount.writers, "which is no count")


def _name(member: str, value: str) -> None:
    if not is_name(value):
        raise BadMember(member, value, "which is no name: 1 to 63 lower-case letters, digits and inner hyphens")


def _plain(member: str, value: str) -> None:
    try:
        check_plain(value, member, maximum=1024 * 1024)
    except Problem:
        raise BadMember(member, value, "which has control characters, or is too long") from None


def _text(member: str, value: str | None, pattern: re.Pattern[str], why: str) -> None:
    if value is not None and pattern.match(value) is None:
        raise BadMember(member, value, why)
