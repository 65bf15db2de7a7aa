"""Access to running guests: their agents, their serial consoles, and current figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from volant.channel import AgentClient
from volant.host import Host
from volant.journal import Projection
from volant.model import Key, Problem, Status, VmMemory, VmRow, VmStats, moving
from volant.session import SerialConsole

from ._actors import VmActors
from ._memory import measure, measure_stats
from ._process import VmProcess

_WITH_CONSOLE = frozenset({Status.STARTING, Status.RUNNING, Status.PAUSED, Status.STOPPING})


class GuestAccess(msgspec.Struct):
    """Access to the running guests of one daemon."""

    host: Host
    projection: Projection
    processes: Mapping[int, VmProcess]
    """The watched processes, by the VM's id."""
    actors: VmActors

    def agent(self, vm: Key) -> AgentClient:
        """Returns the client of a VM's agent.

        :raises Problem: 404, 409 it does not run, 502 its channel is down, or its agent is too old or too new.
        """
        row = self.projection.require(vm)
        if row.leaving is not None:
            raise moving(row, row.leaving)
        if row.status is not Status.RUNNING:
            hints = {
                Status.STARTING: "wait until it runs",
                Status.PAUSED: f"`volar vms resume {vm.name}` lets it go on",
            }
            raise Problem(
                409, "vm-not-running", f"VM {vm.name!r} is {row.status.value}", vm=vm.name,
                hint=hints.get(row.status, f"`volar vms start {vm.name}` starts it"),
            )  # fmt: skip
        process = self.processes.get(row.id)
        connection = process.agent.connection if process is not None else None
        if connection is None or connection.client is None:
            raise Problem(
                502, "agent-unreachable", f"the agent in VM {vm.name!r} can't be reached at present", vm=vm.name,
                hint="its channel is being opened again; try again",
            )  # fmt: skip
        if connection.incompatible is not None:
            raise Problem(
                502, "agent-incompatible",
                f"VM {vm.name!r} runs, but its agent can't be used: {connection.incompatible}", vm=vm.name,
                hint=f"`volar vms restart {vm.name}` boots it with the agent of this version",
            )  # fmt: skip
        return connection.client

    def console(self, vm: Key) -> tuple[VmRow, SerialConsole]:
        """Returns the serial console of a VM, which exists from the first line of its boot to the last.

        :raises Problem: 404; 409, there is no process; 503, the daemon is about to open the console.
        """
        row = self.projection.require(vm)
        if row.process is None or row.status not in _WITH_CONSOLE:
            raise Problem(
                409, "vm-not-running", f"VM {vm.name!r} is {row.status.value}, and its console is there while it runs",
                vm=vm.name,
                hint=f"`volar vms logs {vm.name}` shows its last lines; `volar vms start {vm.name}` starts it",
            )  # fmt: skip
        process = self.processes.get(row.id)
        if process is None or not process.console.is_open:
            raise Problem(
                503, "console-unavailable", f"the console of VM {vm.name!r} is being opened again", vm=vm.name,
                hint="try again",
            )  # fmt: skip
        return row, process.console

    async def memory(self, vm: Key) -> VmMemory:
        """Measures the memory of a VM. :raises Problem: 404; 409, it has no process; 503."""
        row = self.projection.require(vm)
        process = self.processes.get(row.id)
        agent = None
        if process is not None and row.status is Status.RUNNING and process.agent.connection.incompatible is None:
            agent = process.agent.connection.client
        return await measure(self.host, row, agent)

    async def stats(self, rows: Iterable[VmRow]) -> list[VmStats]:
        """Measures the use of the host by VMs; VMs without a process are left out."""
        return await measure_stats(self.host, rows)

    def inspect(self, vm: Key) -> Mapping[str, object]:
        """Returns the internal state of a VM, for people who look for a fault. :raises Problem: 404."""
        row = self.projection.require(vm)
        ref = self.actors.find(row.id)
        # Not the whole row: a workload's environment may hold secrets.
        return {
            "vm": row.view,
            "phase": row.phase,
            "generation": row.generation,
            "revision": row.revision,
            "image": row.image,
            "tag": row.tag,
            "process": row.process,
            "actor": ref.inspect() if ref is not None else None,
        }
