"""Checks whether hypervisors can be sandboxed on this host; see `docs/explanation/sandbox.md`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from volant.host import SandboxSupport
from volant.model.doctor import Finding

from .._directories import memory_dir
from ._context import Context

_ALL_OF_LANDLOCK = 6
_KVM = Path("/dev/kvm")
_MEANS = "an attacker who breaks out of a guest meets a weaker sandbox"


def sandbox(context: Context) -> Sequence[Finding]:
    """Checks separate users and Landlock."""
    settings = context.settings
    if settings.sandbox == "off":
        return [judge_sandbox(None)]
    wanted = (settings.state_dir, settings.runtime_dir, settings.cache_dir, memory_dir(settings))
    # A directory that does not exist yet will be created in its nearest parent.
    support = context.host.sandbox.support(list(dict.fromkeys(_there(path) for path in wanted)))
    if support is None:
        return []
    if support.no_users is None and settings.accelerator != "tcg" and context.host.files.exists(_KVM):
        try:
            context.host.sandbox.group_of(_KVM)
        except PermissionError as error:
            support = msgspec.structs.replace(support, no_users=f"{_KVM}: {error.strerror}")
    return [judge_sandbox(support), judge_landlock(support.landlock)]


def _there(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def judge_sandbox(support: SandboxSupport | None) -> Finding:
    """Judges the layers of the sandbox. `support` is None if the settings disable the sandbox."""
    if support is None:
        return Finding(
            check="sandbox", level="less", found="VOLANT_SANDBOX is off", means=_MEANS, advice="unset VOLANT_SANDBOX"
        )
    if support.no_users is not None:
        return Finding(
            check="sandbox", level="less", found=f"hypervisors have no users of their own: {support.no_users}",
            means=_MEANS, advice="run volantd as root, as the service of `sudo volar setup` does, and let a group open "
            "/dev/kvm, as udev's rules do (`sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm`)",
        )  # fmt: skip
    return Finding(check="sandbox", level="ok", found="each hypervisor has a user of its own and no capabilities")


def judge_landlock(version: int) -> Finding:
    if version >= _ALL_OF_LANDLOCK:
        return Finding(check="landlock", level="ok", found=f"version {version}: files, TCP, signals")
    found = f"version {version} restricts only files" if version else "the kernel has no Landlock"
    return Finding(
        check="landlock", level="less", found=found, means=_MEANS,
        advice="boot a kernel of version 6.12 or later, with `landlock` in `lsm=`" if version else
        "boot a kernel of version 5.13 or later, best 6.12, with `landlock` in `lsm=`",
    )  # fmt: skip
