"""What the guest of a process that waits does before it stands still: a rehearsal of becoming somebody.

Under TCG a guest that wakes up spends nearly all of its time on the translation of code that this very process has not
run before: some ten microseconds a block, 24,000 of them until its first answer; an answer whose code is there takes
15 ms. So the guest of a process that is to wait wakes up once, hears what a VM would hear, and is stopped again.

It is told entropy of its own first. So those that wait have nothing in common from then on, and what their kernels make
when it is first asked for, as the boot id, is nobody else's. Who it is said to be then is replaced by the claim.
"""

from __future__ import annotations

import base64
from functools import partial

import trio

from volant.channel import AgentClient, VirtioSerial, open_channel
from volant.host import Host
from volant.hypervisor import MachineSpec
from volant.model import ProcessIdentity
from volant.model.agent import DAEMON_IDENTITY, HEALTHZ, INFO

from ._ask import ask, while_it_lives
from ._builder import BuildDoors

WARM_S = 20.0
_NAME = "standby"
_ADDRESS, _GATEWAY = "192.0.2.2", "192.0.2.1"
_ENTROPY_BYTES = 64
_ROUNDS = 2
"""Some code runs for the first time when something is done for the second."""
_CALM_S = 0.2
"""For the guest to notice that nobody is there any more."""


async def warm_up(doors: BuildDoors, spec: MachineSpec, identity: ProcessIdentity) -> None:
    """Let the guest of a process that waits answer some requests, and stand still again.

    :raises TemplateFailed: it does not answer, or not in time. :raises HypervisorError:
    """
    async with doors.hypervisor.attach(spec, identity) as machine:
        await machine.resume()
        await while_it_lives(machine, partial(_rehearse, doors.host, spec), WARM_S)
        await trio.sleep(_CALM_S)
        await machine.pause()


async def _rehearse(host: Host, spec: MachineSpec) -> None:
    for _ in range(_ROUNDS):
        async with open_channel(host, VirtioSerial(spec.agent_path)) as channel:
            await channel.ready()
            client = AgentClient(channel)
            nobody: dict[str, object] = {
                "hostname": _NAME,
                "machine_id": host.random.token_bytes(16).hex(),
                "vm_id": 0,
                "entropy": base64.b64encode(host.random.token_bytes(_ENTROPY_BYTES)).decode(),
                "time_ns": int(host.clock.now().timestamp() * 1e6) * 1000,
            }
            if spec.nic is not None:
                # It wakes up, and what it says leads nowhere.
                nobody["network"] = {"mac": spec.nic.mac, "address": _ADDRESS, "prefix": 24, "gateway": _GATEWAY}
            await ask(client, "PUT", DAEMON_IDENTITY, nobody)
            await ask(client, "GET", HEALTHZ)
            await ask(client, "GET", INFO)
