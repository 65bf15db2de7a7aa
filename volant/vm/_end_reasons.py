"""Why a guest, or its hypervisor, ended: codes for clients, words for people."""

from __future__ import annotations

from volant.model import GUEST_SHUTDOWN, EndKind, Reason

_PANIC = "Kernel panic - not syncing"
_OUT_OF_MEMORY = (
    "the kernel killed the hypervisor's process, because the host or the VM's share of it is short of memory"
)

_CODES = {
    EndKind.SHUTDOWN: GUEST_SHUTDOWN,
    EndKind.RESET: "guest_reset",
    EndKind.PANICKED: "guest_panicked",
    EndKind.KILLED: "hypervisor_killed",
    EndKind.EXITED: "hypervisor_exited",
    EndKind.INTERNAL_ERROR: "hypervisor_error",
    EndKind.GONE: "hypervisor_gone",
}
"""Public."""


def reason_of_end(
    kind: EndKind, message: str, console: tuple[str, ...], *, short_of_memory: bool = False
) -> tuple[EndKind, Reason]:
    """Returns how it really ended, and why.

    A kernel that panics before it has the device to report that reboots, as its command line tells it to. Then only its
    last words on the console tell a panic from a reboot. `short_of_memory`: the kernel killed a process of the VM.
    """
    if kind in (EndKind.PANICKED, EndKind.RESET):
        for line in reversed(console):
            _, panic, why = line.partition(_PANIC)
            if panic:
                kind = EndKind.PANICKED
                return kind, Reason(_CODES[kind], f"the guest's kernel panicked{why}", console)
    if short_of_memory and kind in (EndKind.KILLED, EndKind.EXITED):
        return EndKind.KILLED, Reason("out_of_memory", f"{_OUT_OF_MEMORY}: {message}", console)
    return kind, Reason(_CODES[kind], message, console)
