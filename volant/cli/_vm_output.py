"""Prints VMs, their events and outcomes of commands."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TextIO

from volant.client import Waited
from volant.model import Event, EventType, Placement, Reason, Replica, Status, VmView, egress_text

from ._output import Output, styled
from ._run import FAILED, TIMED_OUT, Failure
from ._text import clock, safe, span

_COLOURS = {
    EventType.VM_RUNNING: "green",
    EventType.VM_CRASHED: "red",
    EventType.VM_DELETED: "bright_black",
    EventType.VM_STOPPED: "bright_black",
    EventType.VM_REPLICA_FAILED: "red",
    EventType.WORKLOAD_READY: "green",
    EventType.WORKLOAD_FAILED: "red",
}


_TYPE_WIDTH = max(len(kind) for kind in EventType)


def event_line(event: Event, terminal: TextIO) -> str:
    """Returns an event as text for people."""
    kind = styled(str(event.type).ljust(_TYPE_WIDTH), _COLOURS.get(event.type), terminal)
    text = f"{clock(event.timestamp)}  {kind}  {safe(event.name)}  {safe(event.message)}"
    return text + (f"\n{reason_lines(event.reason)}" if event.reason else "")


def status_of(vm: VmView) -> str:
    """Returns the status of a VM for people; `unreachable` if its host is unreachable."""
    return "unreachable" if vm.unreachable is not None else str(vm.status)


def reason_lines(reason: Reason) -> str:
    """Returns the reason of a VM's status as text for people."""
    lines = [f"  {safe(reason.code)}: {safe(reason.message)}", *(f"  | {safe(line)}" for line in reason.console)]
    return "\n".join(lines)


def outcome(out: Output, name: str, waited: Waited, wanted: str, timeout_s: float) -> int:
    vm = waited.vm
    if waited.outcome == "met":
        if vm is None:
            out.document(None) if out.json else out.line(f"{safe(name)} is {safe(wanted)}")
        else:
            done(out, vm, f"is {out.status(str(vm.status))}" if "deleted" not in wanted else "is deleted")
        return 0
    if out.json:
        out.document(vm)
        return TIMED_OUT if waited.outcome == "timeout" else FAILED
    if waited.outcome == "timeout":
        now = f", it is {vm.status}" if vm is not None else ""
        if vm is not None and vm.workload is not None and vm.status is Status.RUNNING:
            now = f"{now}, and its workload is {workload(vm)}"
        raise Failure(
            f"VM {name!r} is not {wanted} after {timeout_s:g} s{now}",
            code=TIMED_OUT,
            hint=f"it continues: `volar vms wait {name}` waits longer, `volar vms logs {name}` shows its log",
        )
    state = f"is {vm.status}" if vm is not None else "is deleted"
    why = f": {safe(vm.reason.message)}" if vm is not None and vm.reason is not None else ""
    if vm is not None and vm.workload is not None and vm.workload.state == "failed":
        why = f", and its workload has failed: {safe(vm.workload.error or '')}"
    raise Failure(
        f"VM {name!r} {state}{why}",
        hint=f"`volar vms logs {name}` shows its console, `volar vms get {name}` the last lines of it",
    )


def warn(out: Output, vm: VmView) -> None:
    """Prints the daemon's warnings to standard error; with --json they are part of the document."""
    if not out.json:
        for warning in vm.warnings:
            out.note(f"volar: warning: {safe(warning)}")


def done(out: Output, vm: VmView, what: str) -> None:
    out.result(vm, f"{safe(vm.name)} {what}")


def show(out: Output, vm: VmView) -> None:
    if out.json:
        out.document(vm)
        return
    out.fields(
        [
            ("name", vm.name),
            ("id", vm.id),
            ("status", status_of(vm)),
            ("desired", str(vm.desired)),
            ("plugin", vm.plugin),
            ("runtime", vm.runtime),
            ("vCPUs", vm.cpu_cores),
            ("memory", f"{vm.memory_mb} MiB"),
            ("up", up(vm)),
            ("workload", workload(vm)),
            ("pid", vm.pid),
            ("hypervisor", vm.hypervisor and f"{vm.hypervisor} ({vm.accelerator})"),
            ("network", f"{safe(vm.network)} ({safe(vm.network_reason)})"),
            ("address", vm.ip_address),
            ("ports", ", ".join(map(safe, vm.ports))),
            ("egress", egress_text(vm.egress)),
            ("volumes", ", ".join(map(safe, vm.volumes))),
            ("secrets", ", ".join(map(safe, vm.secrets))),
            ("restart policy", vm.restart_policy),
            ("failover", vm.failover),
            ("replicated", vm.replicate and f"every {safe(vm.replicate.every)}, to hosts: {vm.replicate.to}"),
            ("newest replica", vm.replica and _replica(vm.replica)),
            ("placement", _placement(vm.placement)),
            ("moved", vm.move and f"from host {safe(vm.move.from_host)} to {safe(vm.move.to_host)}, {vm.move.at}"),
            ("restarts", vm.restarts),
            ("boots", vm.boots),
            ("booted from", booted_from(vm)),
            ("labels", vm.labels),
            ("kernel cmdline", vm.kernel_cmdline),
            ("created", vm.created_at),
            ("started", vm.started_at),
            ("expires", vm.expires_at),
        ]
    )
    if vm.reason is not None:
        out.line("reason:")
        out.line(reason_lines(vm.reason))


def _replica(replica: Replica) -> str:
    """Returns the age and the hosts of a VM's newest replica, and why there is no better one."""
    text = (
        "none" if replica.at is None else f"{replica.at}, on {', '.join(map(safe, replica.hosts)) or 'no other host'}"
    )
    return text if replica.reason is None else f"{text}: {safe(replica.reason.message)}"


def _placement(wanted: Placement | None) -> str:
    """Returns a placement as options of `vms create`."""
    if wanted is None:
        return ""
    options = [("zone", wanted.zone)] if wanted.zone else []
    for option, labels in (
        ("host-label", wanted.labels),
        ("affinity", wanted.affinity),
        ("anti-affinity", wanted.anti_affinity),
    ):
        options += [(option, f"{key}={value}") for key, value in labels.items()]
    return ", ".join(f"{option} {safe(value)}" for option, value in options)


def up(vm: VmView) -> str:
    if vm.started_at is None or vm.status not in (Status.RUNNING, Status.PAUSED):
        return ""
    return span((datetime.now(UTC) - vm.started_at).total_seconds())


def workload(vm: VmView) -> str:
    if vm.workload is None:
        return ""
    restarts = f", restarts: {vm.workload.restarts}" if vm.workload.restarts else ""
    return vm.workload.state + restarts + (f": {safe(vm.workload.error)}" if vm.workload.error else "")


def expires(vm: VmView) -> str:
    return "" if vm.expires_at is None else vm.expires_at.strftime("%Y-%m-%d %H:%M:%SZ")


def why(vm: VmView) -> str:
    if vm.reason is None and vm.workload is not None and vm.workload.state in ("failed", "unhealthy"):
        return f"workload_{vm.workload.state}"
    return vm.reason.code if vm.reason is not None else ""


def booted_from(vm: VmView) -> str | None:
    if vm.booted_from is None:
        return None
    if vm.origin is not None and vm.booted_from == vm.origin.kind:
        which = "" if vm.origin.snapshot is None else f" {safe(vm.origin.snapshot)}"
        return f"{vm.booted_from}{which} of {safe(vm.origin.vm)}"
    wanted = "" if vm.boot == "auto" else f", as requested: {vm.boot}"
    fallback = "" if vm.fallback is None else f", as a clone failed: {safe(vm.fallback.message)}"
    return f"{vm.booted_from}{wanted}{fallback}"
