"""Checks the processor, QEMU and KVM, with the daemon's own probe."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import trio

from volant.host import PROGRAM_ENVIRONMENT
from volant.hypervisor import AcceleratorChoice
from volant.hypervisor.qemu import PROGRAM, QemuHypervisor
from volant.model.doctor import Finding

from ._context import Context, Device, access_advice, device, user

KVM = "/dev/kvm"
_EMULATED = "guests are emulated: they compute about ten times slower, and all features work"


def machine(context: Context) -> Sequence[Finding]:
    """Checks the processor and the kernel."""
    return [judge_machine(platform.system(), platform.machine(), platform.release(), os.cpu_count() or 1)]


def judge_machine(system: str, processor: str, release: str, cpus: int) -> Finding:
    found = f"{system} {release} on {processor}, {cpus} CPUs"
    if (system, processor) == ("Linux", "x86_64"):
        return Finding(check="machine", level="ok", found=found)
    return Finding(
        check="machine", level="fails", found=found, means="VMs need Linux on x86-64", advice="use another machine"
    )


async def hypervisor(context: Context) -> Sequence[Finding]:
    """Checks QEMU, and whether KVM runs a guest. Ignores the result that the daemon has cached."""
    choice = await QemuHypervisor(context.host, context.scratch, program=PROGRAM).choice()
    kvm = judge_kvm(context.settings.accelerator, choice, device(KVM), _virtualizes(), access_advice(KVM))
    return [judge_qemu(shutil.which(PROGRAM, path=PROGRAM_ENVIRONMENT["PATH"]), choice.version), kvm]


def judge_qemu(path: str | None, version: str | None) -> Finding:
    if version is not None:
        return Finding(check="qemu", level="ok", found=f"QEMU {version}")
    if path is None:
        return Finding(
            check="qemu", level="fails", found=f"{PROGRAM} is not installed", means="no VM can start",
            advice="on Debian: `sudo apt install qemu-system-x86`",
        )  # fmt: skip
    return Finding(
        check="qemu", level="fails", found=f"{path} does not print its version", means="no VM can start",
        advice=f"run `{path} --version` to see why",
    )  # fmt: skip


def judge_kvm(wanted: str, choice: AcceleratorChoice, there: Device, module: str | None, access: str) -> Finding:
    """Judges KVM.

    :param wanted: the setting `accelerator`
    :param module: the kernel module for the processor; None if it can't virtualize
    :param access: advice for a user that may not open the device
    """
    if choice.version is None:
        return Finding(check="kvm", level="less", found="not tested without QEMU", means="the check has no result")
    if choice.accelerator == "kvm":
        if wanted == "tcg":
            return Finding(
                check="kvm", level="less", found="KVM runs guests, but VOLANT_ACCELERATOR is tcg", means=_EMULATED,
                advice="unset VOLANT_ACCELERATOR",
            )  # fmt: skip
        return Finding(check="kvm", level="ok", found="a guest ran on KVM")
    nested = "if this host is a VM, enable nested virtualization for it"
    if there == "denied":
        found, advice = f"{user()} may not open {KVM}", access
    elif there == "usable":
        found, advice = choice.reason, f"{nested}; else see `sudo dmesg | grep -i kvm`"
    elif module is not None:
        found, advice = choice.reason, f"`sudo modprobe {module}`"
    else:
        found = f"{choice.reason}, and the processor has no virtualization"
        advice = f"{nested}; on hardware, enable VT-x or SVM in the firmware"
    if wanted == "kvm":
        return Finding(
            check="kvm", level="fails", found=found, means="VOLANT_ACCELERATOR is kvm, so no VM can start",
            advice=f"unset VOLANT_ACCELERATOR to emulate guests; or {advice}",
        )  # fmt: skip
    return Finding(check="kvm", level="less", found=found, means=_EMULATED, advice=advice)


def _virtualizes() -> str | None:
    """Returns the kernel module for the processor's virtualization; None without any."""
    with open("/proc/cpuinfo", "rb") as file:  # noqa: PTH123 - Path can't read only the beginning
        words = file.read(64 * 1024).split()
    return "kvm_intel" if b"vmx" in words else "kvm_amd" if b"svm" in words else None


class _Program(NamedTuple):
    """A program that only some VMs need."""

    name: str
    option: str
    """The option that prints its version."""
    means: str
    """The functions that are missing without it."""
    package: str
    """The Debian package."""


_IMG = _Program(
    "qemu-img", "--version", "VMs with a root filesystem of their own can't start; others can", "qemu-utils"
)
_MKFS = _Program("mke2fs", "-V", "no volumes can be made, and VMs from OCI images can't start; others can", "e2fsprogs")


async def qemu_img(context: Context) -> Sequence[Finding]:
    """Checks the program that creates VM disks."""
    return [await _check(context, _IMG)]


async def mke2fs(context: Context) -> Sequence[Finding]:
    """Checks the program that formats volumes, and the disks of VMs from OCI images."""
    return [await _check(context, _MKFS)]


def judge_qemu_img(status: int, said: bytes) -> Finding:
    return _judge(_IMG, status, said)


def judge_mke2fs(status: int, said: bytes) -> Finding:
    return _judge(_MKFS, status, said)


async def _check(context: Context, program: _Program) -> Finding:
    try:
        status, said = await context.host.processes.run(
            [program.name, program.option], env=PROGRAM_ENVIRONMENT, cwd=Path("/"), timeout_s=10
        )
    except FileNotFoundError:
        status, said = -1, b""
    except trio.TooSlowError:
        return Finding(check=program.name, level="less", found=f"{program.name} hangs", means=program.means)
    return _judge(program, status, said)


def _judge(program: _Program, status: int, said: bytes) -> Finding:
    lines = said.decode("utf-8", "replace").splitlines()
    if status == 0 and lines:
        return Finding(check=program.name, level="ok", found=lines[0][:80])
    return Finding(
        check=program.name, level="less", found=f"{program.name} is not installed or does not run",
        means=program.means, advice=f"on Debian: `sudo apt install {program.package}`",
    )  # fmt: skip
