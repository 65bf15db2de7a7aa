"""The daemon's settings for its parts: VMs, OCI images, snapshots in registries, DNS servers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import msgspec

from volant.hypervisor.qemu import SandboxPlan
from volant.images import ArtifactCache
from volant.oci import ImageSettings, Isolation
from volant.transfer import TransferSettings, registries
from volant.vm import VmSettings

from ._directories import vm_directories
from ._settings import MAX_NAMESERVERS, Settings, is_nameserver, memory_overcommit, split

_FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""The second file lists the servers of systemd-resolved, if the first only names systemd-resolved itself."""
_MAX_BYTES = 64 * 1024


def nameservers_of_host(files: Iterable[Path] = _FILES) -> tuple[str, ...]:
    """Returns the servers of the first file that lists any that guests can use. Blocks briefly."""
    return _first(files, is_nameserver)


def nameservers_of_daemon(files: Iterable[Path] = _FILES) -> tuple[str, ...]:
    """Returns the servers that the daemon itself can ask, which may be on loopback or have IPv6. Blocks briefly."""
    return _first(files, _is_address)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _first(files: Iterable[Path], is_usable: Callable[[str], bool]) -> tuple[str, ...]:
    for path in files:
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_BYTES).decode(errors="replace")
        except OSError:
            continue
        words = (line.split() for line in text.splitlines())
        found = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver" and is_usable(line[1])]
        if found:
            return tuple(dict.fromkeys(found))[:MAX_NAMESERVERS]
    return ()


_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def vm_settings(settings: Settings) -> VmSettings:
    """Returns the settings of VMs."""
    return msgspec.structs.replace(
        vm_directories(settings),
        kernel=settings.kernel,
        initramfs=settings.initramfs,
        max_vms=settings.max_vms,
        memory_overcommit=memory_overcommit(settings),
        return_memory=settings.return_memory == "on",
        image_timeout_s=settings.image_timeout_s,
        agent_timeout_s=settings.agent_timeout_s,
        nameservers=tuple(split(settings.nameservers)) or nameservers_of_host(),
    )


def transfer_settings(settings: Settings, environ: Mapping[str, str]) -> TransferSettings:
    """Returns the settings of snapshot transfers. Registries are reached in the same way as for images."""
    mbps = settings.transfer_mbps
    return TransferSettings(
        bytes_per_s=None if mbps is None else mbps * 2**20,
        max_bytes=settings.transfer_max_mb * 2**20,
        timeout_s=settings.transfer_timeout_s,
        stalled_s=settings.oci_stall_timeout_s,
        plain_http=frozenset(split(settings.oci_plain_http)),
        certificates=settings.oci_ca_dir,
        auth_file=settings.oci_auth_file,
        environment=_proxies(environ),
    )


def image_settings(
    settings: Settings, environ: Mapping[str, str], sandbox: SandboxPlan | None, artifacts: ArtifactCache
) -> ImageSettings:
    """Returns the settings of images. Fetches use the proxies of the daemon's environment."""
    isolation = None
    if sandbox is not None:
        isolation = Isolation(landlock=sandbox.landlock, users=sandbox.users, places=sandbox.places)
    return ImageSettings(
        state_dir=settings.state_dir,
        cache_dir=settings.cache_dir,
        max_cache_bytes=settings.oci_cache_max_mb * 2**20,
        runtime_dir=settings.runtime_dir,
        timeout_s=settings.oci_timeout_s,
        stall_timeout_s=settings.oci_stall_timeout_s,
        max_bytes=settings.oci_max_mb * 2**20,
        isolation=isolation,
        plain_http=frozenset(split(settings.oci_plain_http)),
        certificates=settings.oci_ca_dir,
        auth_file=settings.oci_auth_file,
        environment=_proxies(environ),
        registries=partial(registries, artifacts),
    )


def _proxies(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.upper() in _PROXIES}
