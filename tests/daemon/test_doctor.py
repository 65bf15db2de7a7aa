"""`volantd check` reports what a host supports, what follows from it and what to do, even when a check hangs."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from volant.daemon import Settings
from volant.daemon._check import _hypervisor
from volant.daemon._check._context import Context
from volant.daemon._check._directories import (
    CACHE,
    RUNTIME,
    STATE,
    Inspected,
    file_system_of,
    inspect_directory,
    judge_directory,
    judge_memory,
)
from volant.daemon._check._examine import CHECKS, Check, examine, in_thread
from volant.daemon._check._hypervisor import judge_kvm, judge_machine, judge_mke2fs, judge_qemu, judge_qemu_img
from volant.daemon._check._network import judge_forwarding, judge_network, judge_passt, judge_rights
from volant.daemon._check._oci import judge_erofs, judge_own, judge_skopeo, judge_unbuilt
from volant.daemon._check._sandbox import judge_landlock, judge_sandbox
from volant.daemon._check._service import judge_cgroups, judge_descriptors, judge_systemd
from volant.host import Host, SandboxSupport
from volant.hypervisor import AcceleratorChoice
from volant.images import ImageError
from volant.model.doctor import Finding, Level

pytestmark = pytest.mark.programs

ROOT = Path(__file__).resolve().parents[2]
NO_KVM = AcceleratorChoice("tcg", "there is no /dev/kvm", "10.0.0")
NO_GUEST = AcceleratorChoice("tcg", "KVM runs no guest here: QEMU ended with status 1", "10.0.0")
RUNS = AcceleratorChoice("kvm", "a guest ran on KVM", "10.0.0")
HERE = Path("/var/lib/volant")


def kvm(choice: AcceleratorChoice, **other: str) -> Finding:
    facts = {"wanted": "auto", "there": "missing", "module": "kvm_intel", "access": "ask root"} | other
    return judge_kvm(facts["wanted"], choice, facts["there"], facts["module"] or None, facts["access"])  # type: ignore[arg-type]


def directory(**changes: Any) -> Inspected:
    usual = Inspected(path=HERE, existing=HERE, writable=True, file_system="ext4", free_mb=10_000)
    return dataclasses.replace(usual, **changes)


@pytest.mark.parametrize(
    ("finding", "level", "says"),
    [
        (judge_machine("Linux", "x86_64", "6.12", 4), "ok", "4 CPUs"),
        (judge_machine("Linux", "aarch64", "6.12", 4), "fails", "x86-64"),
        (judge_qemu("/usr/bin/q", "10.0.3"), "ok", "QEMU 10.0.3"),
        (judge_qemu(None, None), "fails", "apt install qemu-system-x86"),
        (judge_qemu("/usr/bin/q", None), "fails", "/usr/bin/q --version"),
        (judge_qemu_img(0, b"qemu-img version 10\nCopyright"), "ok", "qemu-img version 10"),
        (judge_qemu_img(-1, b""), "less", "apt install qemu-utils"),
        (judge_qemu_img(127, b"what"), "less", "apt install qemu-utils"),
        (judge_mke2fs(0, b"mke2fs 1.47.2 (1-Jan-2025)\n\tUsing"), "ok", "mke2fs 1.47.2 (1-Jan-2025)"),
        (judge_mke2fs(-1, b""), "less", "apt install e2fsprogs"),
        (kvm(RUNS), "ok", "a guest ran on KVM"),
        (kvm(RUNS, wanted="tcg"), "less", "VOLANT_ACCELERATOR"),
        (kvm(NO_KVM), "less", "modprobe kvm_intel"),
        (kvm(NO_KVM, module=""), "less", "nested"),
        (kvm(NO_GUEST, there="denied"), "less", "ask root"),
        (kvm(NO_GUEST, there="usable"), "less", "ended with status 1"),
        (kvm(NO_GUEST, there="usable", wanted="kvm"), "fails", "unset VOLANT_ACCELERATOR"),
        (kvm(AcceleratorChoice("tcg", "no QEMU", None)), "less", "not tested"),
        (judge_sandbox(SandboxSupport(7, True, None)), "ok", "a user of its own"),
        (judge_sandbox(SandboxSupport(7, True, "volantd does not run as root")), "less", "not run as root"),
        (judge_sandbox(None), "less", "VOLANT_SANDBOX"),
        (judge_landlock(7), "ok", "version 7"),
        (judge_landlock(3), "less", "6.12"),
        (judge_landlock(0), "less", "5.13"),
        (judge_own(Path("/")), "ok", "/"),
        (judge_own(Path("/none")), "fails", "VOLANT_KERNEL"),
        (judge_unbuilt(HERE, None), "less", "volar boot-images build"),
        (judge_unbuilt(HERE, ImageError("no_mmdebstrap", "There is none", "install it")), "fails", "install it"),
        (judge_directory(STATE, directory()), "ok", "10000 MiB free (ext4)"),
        (judge_directory(STATE, directory(writable=False)), "fails", "VOLANT_STATE_DIR"),
        (judge_directory(RUNTIME, directory(writable=False, existing=Path("/var"))), "fails", "in /var"),
        (judge_directory(STATE, directory(free_mb=63)), "fails", "63 MiB free"),
        (judge_directory(STATE, directory(free_mb=1000)), "less", "free some space"),
        (judge_directory(STATE, directory(file_system="tmpfs")), "less", "lost on a reboot"),
        (judge_directory(STATE, directory(file_system="nfs4")), "less", "fsync"),
        (judge_directory(RUNTIME, directory(file_system="tmpfs", free_mb=40)), "ok", "tmpfs"),
        (judge_directory(CACHE, directory(free_mb=500)), "less", "VOLANT_CACHE_DIR"),
        (judge_memory(directory(file_system="tmpfs"), 5000), "ok", "19 guests"),
        (judge_memory(directory(file_system="tmpfs", free_mb=64), 5000), "less", "--shm-size"),
        (judge_memory(directory(file_system="tmpfs", free_mb=1000), 5000), "less", "remount"),
        (judge_memory(directory(file_system="tmpfs"), 63), "fails", "stop programs"),
        (judge_memory(directory(), 5000), "less", "tmpfs at /dev/shm"),
        (judge_memory(directory(writable=False), 5000), "fails", "can't write"),
        (judge_descriptors(524288, 1000), "ok", "524288"),
        (judge_descriptors(-1, 1000), "ok", "unlimited"),
        (judge_descriptors(1856, 80), "ok", "1856"),
        (judge_descriptors(1024, 80), "less", "about 38 VMs; 80 can run, which need 1856"),
        (judge_systemd(b"systemd 257 (257.8)\n+PAM"), "ok", "systemd 257"),
        (judge_systemd(b"systemd 252 (252.1)\n"), "less", "systemd 252"),
        (judge_systemd(b""), "less", "systemctl --version"),
        (judge_systemd(None), "less", "another service manager"),
        (judge_cgroups(["cpu", "io", "memory", "pids"]), "ok", "cgroup2"),
        (judge_cgroups(["cpu", "pids"]), "less", "without memory"),
        (judge_cgroups(None), "less", "unified_cgroup_hierarchy"),
        (judge_rights(True), "ok", "may configure"),
        (judge_rights(False), "less", "volar setup"),
        (judge_passt(None, filtered=True), "ok", "installed"),
        (judge_passt(None, filtered=False), "less", "reaches this host's own addresses"),
        (judge_passt("passt is not installed", filtered=True), "less", "apt install passt"),
        (judge_skopeo("1.18.0"), "ok", "skopeo 1.18.0"),
        (judge_skopeo(None), "less", "apt install skopeo"),
        (judge_erofs("1.8.6"), "ok", "1.8.6"),
        (judge_erofs("1.10"), "ok", "1.10"),
        (judge_erofs("1.7.1"), "less", "at least 1.8"),
        (judge_erofs(None), "less", "apt install erofs-utils"),
        (judge_forwarding("1"), "ok", "are forwarded"),
        (judge_forwarding("0"), "less", "sysctl"),
    ],
)
def test_a_finding_has_a_fact_its_consequence_and_advice(finding: Finding, level: Level, says: str) -> None:
    assert finding.level == level, finding
    assert says in " ".join((finding.found, finding.means, finding.advice))
    assert bool(finding.means) == (level != "ok"), finding


def test_each_feature_that_the_kernel_lacks_is_a_finding() -> None:
    made, denied, absent = judge_network(
        {"bridge": None, "tap": "Permission denied", "nftables": "Protocol not supported"}, "ask root"
    )
    assert (made.level, denied.level, absent.level) == ("ok", "less", "less")
    assert denied.advice == "ask root"
    assert "modprobe nf_tables" in absent.advice
    assert [finding.check for finding in judge_network({"namespace": "Operation not permitted"}, None)] == ["network"]


def test_the_file_system_of_a_path_is_the_nearest_and_latest_mount() -> None:
    mounts = (
        "22 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "23 22 0:21 / /var/my\\040lib rw shared:1 - nfs4 host:/x rw\n"
        "24 22 0:22 / /tmp rw - ext4 /dev/vdb rw\n"
        "25 22 0:23 / /tmp rw - tmpfs tmpfs rw\n"
        "no line of these\n"
    )
    for path, kind in (("/var/lib", "ext4"), ("/var/my lib/a", "nfs4"), ("/tmp/a", "tmpfs"), ("/tmpx", "ext4")):
        assert file_system_of(Path(path), mounts) == kind
    assert file_system_of(Path("/"), "") == ""


def test_a_missing_directory_is_judged_by_its_nearest_parent(tmp_path: Path) -> None:
    found = inspect_directory(tmp_path / "a" / "b")
    assert (found.existing, found.writable) == (tmp_path, True)
    assert found.free_mb > 0
    (tmp_path / "file").write_text("")
    assert not inspect_directory(tmp_path / "file").writable
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def settings(directory: Path) -> Settings:
    return Settings(state_dir=directory / "s", runtime_dir=directory / "r", cache_dir=directory / "c")


async def test_a_check_that_hangs_or_fails_is_a_finding_and_the_others_are_reported(tmp_path: Path) -> None:
    released = threading.Event()

    def stuck(context: Context) -> Sequence[Finding]:
        released.wait(20)
        return []

    async def hangs(context: Context) -> Sequence[Finding]:
        await trio.sleep_forever()
        raise AssertionError

    async def breaks(context: Context) -> Sequence[Finding]:
        raise PermissionError(13, "Permission denied", "/proc/x")

    async def fine(context: Context) -> Sequence[Finding]:
        assert context.scratch.is_dir()
        return [Finding(check="fine", level="ok", found="it is")]

    checks: tuple[tuple[str, float, Check], ...] = (
        ("stuck", 0.2, in_thread(stuck)),
        ("hangs", 0.2, hangs),
        ("breaks", 10, breaks),
        ("fine", 10, fine),
    )
    with trio.fail_after(10):
        report = await examine(settings(tmp_path), Host(), checks)
    released.set()
    assert [(finding.check, finding.level) for finding in report.findings] == [
        ("stuck", "less"), ("hangs", "less"), ("breaks", "less"), ("fine", "ok"),
    ]  # fmt: skip
    assert "0.2 s" in report.findings[0].found
    assert "/proc/x" in report.findings[2].found
    assert report.lesser == ["stuck", "hangs", "breaks"]


async def test_checking_this_host_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "tmp"
    await trio.Path(scratch).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    report = await examine(settings(tmp_path), Host())
    levels = {finding.check: finding.level for finding in report.findings}
    # These are reported under other names, or not at all: the daemon of these settings has no certificate.
    others = {"directories", "network", "tls"}
    assert levels.keys() >= {name for name, _, _ in CHECKS} - others | {"kvm", "cache", "runtime"}
    assert "network" in levels or levels.keys() >= {"bridge", "tap", "nftables"}
    assert (levels["machine"], levels["state"]) == ("ok", "ok")
    assert levels["qemu"] == ("ok" if shutil.which("qemu-system-x86_64") else "fails")
    assert [path.name for path in await trio.Path(tmp_path).rglob("*")] == ["tmp"]


async def test_a_broken_qemu_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "qemu"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    for program, says in ((str(broken), "does not print"), ("no-such-qemu", "not installed")):
        monkeypatch.setattr(_hypervisor, "PROGRAM", program)
        qemu, kvm = await _hypervisor.hypervisor(Context(Host(), settings(tmp_path), tmp_path))
        assert (qemu.level, kvm.level) == ("fails", "less")
        assert says in qemu.found


def test_an_invalid_setting_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "volant.daemon.main", "check", "--state-dir", str(tmp_path), "--max-boots", "many"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "max_boots" in done.stderr
