"""QEMU tells why a guest ended, or the kernel with its last words; a process tells how often it wakes up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from volant.host import Host, ProcessGone
from volant.model import EndKind, ProcessIdentity
from volant.vm._process import Wakeups, reason_of_end

_CONSOLE = ("[    2.5] Kernel panic - not syncing: VFS: Unable to mount root fs", "[    2.6] Call Trace:")

IDENTITY = ProcessIdentity(pid=7, start_time=1, boot_id="boot", tag="volant-ab12-7.1")


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


def test_the_rate_counts_from_the_inspection_before() -> None:
    figures = iter([(10.0, 500), (10.5, 510), (14.0, 540), (16.0, 530)])
    now = 0.0

    def wakeups(identity: ProcessIdentity) -> int:
        nonlocal now
        now, total = next(figures, (0.0, -1))
        if total < 0:
            raise ProcessGone("it has ended")
        return total

    fake: Any = SimpleNamespace(proc=SimpleNamespace(wakeups=wakeups), clock=SimpleNamespace(monotonic=lambda: now))
    counter = Wakeups(cast(Host, fake), IDENTITY)
    assert counter.inspect() == {"total": 500, "per_s": None, "over_s": None}
    # Half a second later is too early.
    assert counter.inspect() == {"total": 510, "per_s": None, "over_s": None}
    assert counter.inspect() == {"total": 540, "per_s": 10.0, "over_s": 4.0}
    # Threads have ended, and their wake-ups with them.
    assert counter.inspect() == {"total": 530, "per_s": 0.0, "over_s": 2.0}
    assert counter.inspect() is None
