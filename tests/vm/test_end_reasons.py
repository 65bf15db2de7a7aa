"""Why a guest ended is told by what QEMU saw, and by the kernel's last words where QEMU could not see it."""

from __future__ import annotations

from volant.model import EndKind
from volant.vm._process import reason_of_end

_CONSOLE = ("[    2.5] Kernel panic - not syncing: VFS: Unable to mount root fs", "[    2.6] Call Trace:")


def test_a_panic_before_the_kernel_can_tell_of_it_is_no_reboot() -> None:
    reason = reason_of_end(EndKind.RESET, "the guest rebooted", _CONSOLE)
    assert reason.code == "guest_panicked"
    assert reason.message == "the guest's kernel panicked: VFS: Unable to mount root fs"
    assert reason.console == _CONSOLE


def test_a_panic_without_words_is_one_all_the_same() -> None:
    assert reason_of_end(EndKind.PANICKED, "the guest's kernel panicked", ()).code == "guest_panicked"


def test_a_reboot_is_a_reboot() -> None:
    reason = reason_of_end(EndKind.RESET, "the guest rebooted", ("Restarting system.",))
    assert (reason.code, reason.message) == ("guest_reset", "the guest rebooted")


def test_a_killed_hypervisor_is_not_blamed_on_the_guest() -> None:
    assert reason_of_end(EndKind.KILLED, "killed", _CONSOLE).code == "hypervisor_killed"
