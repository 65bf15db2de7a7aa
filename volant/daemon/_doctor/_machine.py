"""The machine, QEMU, and what runs guests: the daemon's own probe, tried anew."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import trio

from volant.hypervisor import AcceleratorChoice
from volant.hypervisor.qemu import ENVIRONMENT, PROGRAM, QemuHypervisor
from volant.model.doctor import Finding

from ._given import Device, Given, device, let_in

KVM = "/dev/kvm"
_IMG = "qemu-img"
_EMULATED = "guests are emulated: whatever computes in them takes some ten times as long, and all else is the same"


def machine(given: Given) -> Sequence[Finding]:
    """The processor and the kernel."""
    return [judge_machine(platform.system(), platform.machine(), platform.release(), os.cpu_count() or 1)]


def judge_machine(system: str, processor: str, release: str, cpus: int) -> Finding:
    found = f"{system} {release} on {processor}, {cpus} CPUs"
    if (system, processor) == ("Linux", "x86_64"):
        return Finding(check="machine", level="ok", found=found)
    return Finding(
        check="machine", level="fails", found=found, means="VMs are x86-64, on Linux", advice="take another machine"
    )


async def hypervisor(given: Given) -> Sequence[Finding]:
    """QEMU, and whether KVM runs a guest. What the daemon has remembered of that is not believed."""
    choice = await QemuHypervisor(given.host, given.scratch, program=PROGRAM).choice()
    kvm = judge_kvm(given.settings.accelerator, choice, device(KVM), _virtualizes(), let_in(KVM))
    return [judge_qemu(shutil.which(PROGRAM, path=ENVIRONMENT["PATH"]), choice.version), kvm]


def judge_qemu(path: str | None, version: str | None) -> Finding:
    if version is not None:
        return Finding(check="qemu", level="ok", found=f"QEMU {version}")
    if path is None:
        return Finding(
            check="qemu", level="fails", found=f"there is no program {PROGRAM}", means="no VM can start",
            advice="install it; Debian: `sudo apt install qemu-system-x86`",
        )  # fmt: skip
    return Finding(
        check="qemu", level="fails", found=f"{path} does not tell its version", means="no VM can start",
        advice=f"run `{path} --version` and see",
    )  # fmt: skip


def judge_kvm(
    wanted: str, choice: AcceleratorChoice, there: Device, module: str | None, how_to_be_let_in: str
) -> Finding:
    """`module`: the kernel module that the processor would want; None where it can't virtualize at all."""
    if choice.version is None:
        return Finding(check="kvm", level="less", found="not tried, as there is no QEMU", means="it is not known")
    if choice.accelerator == "kvm":
        if wanted == "tcg":
            return Finding(
                check="kvm", level="less", found="it runs guests, and the settings say not to use it", means=_EMULATED,
                advice="leave out VOLANT_ACCELERATOR",
            )  # fmt: skip
        return Finding(check="kvm", level="ok", found="a guest ran on it")
    nested = "where this is a VM itself, have whoever runs it allow nested virtualization"
    if there == "denied":
        found, advice = f"this user may not open {KVM}", how_to_be_let_in
    elif there == "there":
        found, advice = choice.reason, f"{nested}; else look into `sudo dmesg | grep -i kvm`"
    elif module is not None:
        found, advice = choice.reason, f"`sudo modprobe {module}`"
    else:
        found = f"{choice.reason}, and the processor offers no virtualization"
        advice = f"{nested}; on hardware it is a setting of the firmware (VT-x, SVM)"
    if wanted == "kvm":
        return Finding(
            check="kvm", level="fails", found=found, means="the settings say kvm, so no VM can start",
            advice=f"leave out VOLANT_ACCELERATOR, and guests are emulated; or {advice}",
        )  # fmt: skip
    return Finding(check="kvm", level="less", found=found, means=_EMULATED, advice=advice)


def _virtualizes() -> str | None:
    with open("/proc/cpuinfo", "rb") as file:  # noqa: PTH123 - of its beginning alone
        words = file.read(64 * 1024).split()
    return "kvm_intel" if b"vmx" in words else "kvm_amd" if b"svm" in words else None


async def qemu_img(given: Given) -> Sequence[Finding]:
    """What makes the disks of VMs that have one."""
    try:
        status, said = await given.host.run_program([_IMG, "--version"], env=ENVIRONMENT, cwd=Path("/"), timeout_s=10)
    except FileNotFoundError:
        status, said = -1, b""
    except trio.TooSlowError:
        return [Finding(check="qemu-img", level="less", found=f"{_IMG} hangs", means=_NO_DISKS)]
    return [judge_qemu_img(status, said)]


_NO_DISKS = "no VM with a root filesystem of its own can start; others can"


def judge_qemu_img(status: int, said: bytes) -> Finding:
    lines = said.decode("utf-8", "replace").splitlines()
    if status == 0 and lines:
        return Finding(check="qemu-img", level="ok", found=lines[0][:80])
    return Finding(
        check="qemu-img", level="less", found=f"there is no program {_IMG} that runs", means=_NO_DISKS,
        advice="install it; Debian: `sudo apt install qemu-utils`",
    )  # fmt: skip
