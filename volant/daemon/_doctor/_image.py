"""Checks what VMs boot from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from volant import images
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
