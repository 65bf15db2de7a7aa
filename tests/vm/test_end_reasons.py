"""QEMU tells why a guest ended, and the kernel's last words do where QEMU could not see it."""

from __future__ import annotations

from volant.model import EndKind
from volant.vm._process import reason_of_end

_CONSOLE = ("[    2.5] Kernel panic - not syncing: VFS: Unable to mount root fs", "[    2.6] Call Trace:")


def test_an_early_panic_is_told_from_a_reboot_by_the_console() -> None:
    _, reason = reason_of_end(EndKind.RESET, "the guest rebooted", _CONSOLE)
    assert reason.code == "guest_panicked"
    assert reason.message == "the guest's kernel panicked: VFS: Unable to mount root fs"
    assert reason.console == _CONSOLE


def test_a_panic_without_console_output_is_a_panic() -> None:
    _, reason = reason_of_end(EndKind.PANICKED, "the guest's kernel panicked", ())
    assert reason.code == "guest_panicked"


def test_a_reboot_is_a_reboot() -> None:
    _, reason = reason_of_end(EndKind.RESET, "the guest rebooted", ("Restarting system.",))
    assert (reason.code, reason.message) == ("guest_reset", "the guest rebooted")


def test_a_killed_hypervisor_is_not_blamed_on_the_guest() -> None:
    _, reason = reason_of_end(EndKind.KILLED, "killed", _CONSOLE)
    assert reason.code == "hypervisor_killed"
