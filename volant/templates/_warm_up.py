"""Warms up a process: its guest rehearses a claim by a VM, and is paused again.

Under TCG a resumed guest spends nearly all of its time on translating code that its process has not run before: some
ten microseconds per block, 24,000 blocks until its first answer. An answer with translated code takes 15 ms. So the
guest of a warm process is resumed once, receives an identity like a VM's guest, does the usual first actions (a
command, a file, a port), and is paused.

It receives its own entropy first. So warm processes share no random state from then on, and values that a kernel
creates once, such as the boot id, are unique. The claim replaces the identity.
"""

from __future__ import annotations

import base64
from functools import partial

import msgspec
import trio

from volant.channel import (
    AgentClient,
    AgentProtocolError,
    AgentUnreachable,
    Channel,
    ChannelStream,
    ParkedLink,
    VirtioSerial,
    open_channel,
)
from volant.host import Host
from volant.hypervisor import Hypervisor, MachineSpec, ParkedControl
from volant.model import ProcessIdentity
from volant.model.agent import DAEMON_IDENTITY, EXEC, FILES, HEALTHZ, INFO

from ._guest import ANSWER_S, TemplateFailed, ask, while_alive

WARM_S = 20.0
_NAME = "standby"
_ADDRESS, _GATEWAY = "192.0.2.2", "192.0.2.1"
_ENTROPY_BYTES = 64
_COMMAND = b'{"command": ["/bin/true"]}'
_UPGRADE = [
    (b"connection", b"Upgrade"),
    (b"upgrade", b"websocket"),
    (b"sec-websocket-version", b"13"),
    (b"sec-websocket-key", base64.b64encode(bytes(16))),
]
_LAST = (b'"exit_code"', b'"error"')
"""Parts of a session's last message, which contains one of them."""
_TEXT_FRAME, _MASKED = 0x81, 0x80
_FILE = f"{FILES}etc/passwd"
_PORT = "127.0.0.1:1"
_MAX_ANSWER_BYTES = 1024 * 1024
_SETTLE_S = 0.2
"""The time for the guest to finish work that the last request has started."""


class Connections(msgspec.Struct):
    """The daemon's connections to a warm process, until a VM takes it over."""

    link: ParkedLink | None = None
    """The link to the guest's agent."""
    control: ParkedControl | None = None
    """The connection to the hypervisor."""

    def take_link(self) -> ParkedLink | None:
        """Returns the link, once."""
        link, self.link = self.link, None
        return link

    def take_control(self) -> ParkedControl | None:
        """Returns the control connection, once."""
        control, self.control = self.control, None
        return control

    async def aclose(self) -> None:
        """Closes unused connections."""
        for connection in (self.take_link(), self.take_control()):
            if connection is not None:
                await connection.aclose()


async def warm_up(
    host: Host, hypervisor: Hypervisor, spec: MachineSpec, identity: ProcessIdentity
) -> Connections | None:
    """Lets the guest answer some requests, and pauses it again. Returns the connections to it, for the VM.

    :raises TemplateFailed: it does not answer, or not in time. :raises HypervisorError:
    """
    address = VirtioSerial(spec.agent_path)
    async with hypervisor.attach(spec, identity) as machine:
        await machine.resume()
        async with open_channel(host, address) as channel:
            await while_alive(machine, partial(_rehearse, host, spec, channel), WARM_S)
        # Some code runs for the first time when something is done for the second.
        async with open_channel(host, address) as channel:
            await while_alive(machine, partial(_rehearse, host, spec, channel), WARM_S)
            await trio.sleep(_SETTLE_S)
            await machine.pause()
            return Connections(channel.park(), machine.park())


async def _rehearse(host: Host, spec: MachineSpec, channel: Channel) -> None:
    await channel.ready()
    client = AgentClient(channel)
    identity: dict[str, object] = {
        "hostname": _NAME,
        "machine_id": host.random.token_bytes(16).hex(),
        "vm_id": 0,
        "entropy": base64.b64encode(host.random.token_bytes(_ENTROPY_BYTES)).decode(),
        "time_ns": int(host.clock.now().timestamp() * 1e6) * 1000,
    }
    if spec.nic is not None:
        # The NIC wakes up, too; what the guest sends leads nowhere.
        identity["network"] = {"mac": spec.nic.mac, "address": _ADDRESS, "prefix": 24, "gateway": _GATEWAY}
    await ask(client, "PUT", DAEMON_IDENTITY, identity)
    await ask(client, "GET", HEALTHZ)
    await ask(client, "GET", INFO)
    await _use(client, "POST", EXEC, _COMMAND)
    await _use(client, "GET", EXEC, upgrade=_COMMAND)
    await _use(client, "GET", _FILE)
    await _use(client, "CONNECT", _PORT)


async def _use(
    client: AgentClient, method: str, target: str, body: bytes | None = None, *, upgrade: bytes | None = None
) -> None:
    """Sends a request like a user's. A refusal is just as good a rehearsal: not every guest has this program, file or
    port.

    :param upgrade: the first message over a WebSocket
    :raises TemplateFailed: there is no answer.
    """
    headers = [] if body is None else [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if upgrade is not None:
        headers = _UPGRADE
    try:
        with trio.fail_after(ANSWER_S):
            async with client.stream(method, target, headers, body, timeout_s=ANSWER_S, reserved=True) as response:
                if not response.switched:
                    await response.read(_MAX_ANSWER_BYTES)
                elif upgrade is not None:
                    await _say(response.upgraded(), upgrade)
    except (AgentUnreachable, AgentProtocolError, trio.TooSlowError, trio.BrokenResourceError) as error:
        raise TemplateFailed("agent_timeout", f"the guest does not answer {method} {target}: {error}") from error


async def _say(stream: ChannelStream, text: bytes) -> None:
    """Sends a short text over a WebSocket, and reads until the command has ended, or could not start. The mask is
    zero."""
    await stream.send_all(bytes([_TEXT_FRAME, _MASKED | len(text), 0, 0, 0, 0]) + text)
    answer = b""
    while len(answer) < _MAX_ANSWER_BYTES and not any(key in answer for key in _LAST):
        data = await stream.receive_some(_MAX_ANSWER_BYTES)
        if not data:
            return
        answer += data
