"""Checks boot images, and the requirements for OCI images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import trio

from volant import images
from volant.host import PROGRAM_ENVIRONMENT
from volant.model.doctor import Finding

from ._context import Context


def image(context: Context) -> Sequence[Finding]:
    """Checks the kernel and initramfs of VMs whose plugin has none."""
    settings = context.settings
    if settings.kernel is not None and settings.initramfs is not None:
        return [judge_own(settings.kernel, settings.initramfs)]
    built = images.find(settings.cache_dir)
    if built is not None:
        size = built.size_bytes / 2**20
        found = f"built from Debian's kernel {built.kernel_version}, {size:.0f} MiB, {built.digest[:12]}"
        return [Finding(check="image", level="ok", found=found)]
    return [judge_unbuilt(settings.cache_dir, images.obstacle())]


def judge_own(*paths: Path) -> Finding:
    unread = [str(path) for path in paths if not os.access(path, os.R_OK)]
    if not unread:
        return Finding(check="image", level="ok", found=f"set to {' and '.join(map(str, paths))}")
    return Finding(
        check="image", level="fails", found=f"{' and '.join(unread)} can't be read",
        means="VMs whose plugin has no kernel can't start", advice="correct VOLANT_KERNEL and VOLANT_INITRAMFS",
    )  # fmt: skip


def judge_unbuilt(cache: Path, obstacle: images.ImageError | None) -> Finding:
    if obstacle is None:
        return Finding(
            check="image", level="less", found=f"no boot image is built in {cache}",
            means="the first VM builds it, which takes seconds to minutes and needs the Debian archive",
            advice="run `volar boot-images build` as the user that runs volantd",
        )  # fmt: skip
    return Finding(
        check="image", level="fails", found=f"no boot image is built in {cache}, and it can't be: {obstacle.message}",
        means="VMs whose plugin has no kernel can't start", advice=obstacle.hint,
    )  # fmt: skip


_VERSION = re.compile(r"\d+(?:\.\d+)+")
_ANSWER_S = 5.0
_LEAST_EROFS = (1, 8)
"""The first version that makes a layer from a tar with the times of its files."""
_MEANS = "VMs can't boot OCI images that are not in the cache"


async def skopeo(context: Context) -> Sequence[Finding]:
    """Checks the program that fetches OCI images."""
    return [judge_skopeo(await _version(context, "skopeo"))]


async def erofs(context: Context) -> Sequence[Finding]:
    """Checks the program that converts layers of OCI images."""
    return [judge_erofs(await _version(context, "mkfs.erofs"))]


def judge_skopeo(version: str | None) -> Finding:
    """Judges skopeo; None if it is missing."""
    if version is None:
        return Finding(
            check="skopeo", level="less", found="skopeo is not installed", means=_MEANS,
            advice="on Debian: `sudo apt install skopeo`",
        )  # fmt: skip
    return Finding(check="skopeo", level="ok", found=f"skopeo {version}")


def judge_erofs(version: str | None) -> Finding:
    """Judges mkfs.erofs; None if it is missing."""
    advice = "on Debian: `sudo apt install erofs-utils`"
    if version is None:
        return Finding(
            check="mkfs.erofs", level="less", found="mkfs.erofs is not installed", means=_MEANS, advice=advice
        )
    if tuple(map(int, version.split(".")))[:2] < _LEAST_EROFS:
        return Finding(
            check="mkfs.erofs", level="less", found=f"mkfs.erofs {version} is too old", means=_MEANS,
            advice=f"{advice}, at least {'.'.join(map(str, _LEAST_EROFS))}",
        )  # fmt: skip
    return Finding(check="mkfs.erofs", level="ok", found=f"mkfs.erofs {version}")


async def _version(context: Context, program: str) -> str | None:
    try:
        status, output = await context.host.processes.run(
            [program, "--version"], env=PROGRAM_ENVIRONMENT, cwd=context.scratch, timeout_s=_ANSWER_S
        )
    except (FileNotFoundError, trio.TooSlowError):
        return None
    found = _VERSION.search(output.decode(errors="replace"))
    return found[0] if status == 0 and found else None
