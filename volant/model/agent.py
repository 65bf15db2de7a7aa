"""The protocol between the host and the guest's agent, imported by both sides.

The guest has neither msgspec nor trio, and every import costs time in each boot. So this module uses little of the
standard library, JSON bodies are plain dictionaries (`agent_types.py` describes them), and each side checks what it
reads.

A request is one byte stream to `AGENT_PORT` with one HTTP/1.1 exchange: no keep-alive, the stream ends with the answer.
A half close only ends the request. When a client closes or resets the stream, its request is cancelled.
`CONNECT 127.0.0.1:PORT` makes the stream a connection to the guest's loopback, which passes on half closes.

Versions: daemon and agent may be of different releases. `/v1/info` has `protocol: {"min", "max"}`, and the highest
version that both sides speak is used. Within a version, answers may get new fields, which clients ignore; requests with
unknown fields are refused.
"""

from __future__ import annotations

import signal
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing is slow to import
    from typing import Final


PROTOCOL_MIN: Final = 1
PROTOCOL_VERSION: Final = 5
"""The newest version that this code speaks."""
IDENTITY_WORKLOAD_SINCE: Final = 2
"""The first version in which an `Identity` may have `manifest` and `workload`."""
IDENTITY_NETWORK_SINCE: Final = 3
"""The first version in which an `Identity` may have `network`, and with `DAEMON_HOSTS`."""
IDENTITY_AS_IT_IS_SINCE: Final = 3
"""The first version in which an `Identity` may have `as_it_is`."""
VOLUMES_SINCE: Final = 4
"""The first version with `DAEMON_VOLUMES`."""
SECRETS_SINCE: Final = 5
"""The first version with `DAEMON_SECRETS`."""

AGENT_PORT: Final = 1024
"""The vsock port on which the agent listens; over virtio-serial, the `:authority` of the CONNECT."""
SERIAL_PORT_NAME: Final = "volant.agent.0"
"""The name of the virtio-serial port for the multiplexer."""

RESYNC_MAGIC: Final = b"volant-resync-1\n"
"""The bytes that follow the zeros which a host sends when it connects to the serial port, see
`volant/guest/_mux.py`."""
RESYNC_NONCE_BYTES: Final = 16
"""The number of random bytes after the magic; the agent sends them back before its first frame."""

HEALTHZ: Final = "/healthz"
AGENT_PREFIX: Final = "/v1/"
"""The prefix of the agent's own routes, except `WORKLOAD_PREFIX`."""
INFO: Final = "/v1/info"
EXEC: Final = "/v1/exec"
"""`POST`: a command, its output as NDJSON. `GET`: a WebSocket to an interactive command; see `EXEC_SESSIONS`."""
EXEC_SESSIONS: Final = "/v1/exec/sessions"
"""`GET`: the commands that `GET /v1/exec?detach=true` has started. Each has a route below it with its id: `GET`, or
`DELETE` to kill and remove it. `GET /v1/exec?attach=ID&from=POSITION` attaches to it."""
WORKLOAD_SESSION: Final = "workload"
"""The id in that list of a workload that waited for its first client. `GET /v1/exec?workload=true` is that client: its
first message has no command, and the workload starts."""
FILES: Final = "/v1/files/"
"""Below it, each file and directory of the guest: `GET`, `HEAD`, `PUT` and `DELETE`."""
WORKLOAD_PREFIX: Final = "/v1/workload/"
"""The prefix of the workload's routes: `/v1/workload/x` is the workload's `/x`, even if a route of the agent hides
it."""
DAEMON_PREFIX: Final = "/v1/daemon/"
"""The prefix of routes for the daemon only. Its API must not relay them."""
DAEMON_WORKLOAD: Final = "/v1/daemon/workload"
"""`PUT` a `WorkloadSpec`: the same spec again is accepted, a different one is a 409. `GET`: the `WorkloadStatus`."""
DAEMON_MANIFEST: Final = "/v1/daemon/manifest"
"""`PUT` the manifest of the VM's plugin, without `boot`. Older agents answer 404."""
DAEMON_IDENTITY: Final = "/v1/daemon/identity"
"""`PUT` an `Identity`, the first request to a guest that was restored from a template. Answered with an `Identified`
once the guest has that identity. 500: the system refuses; 503: the workload is not healthy."""
DAEMON_CLOCK: Final = "/v1/daemon/clock"
"""`PUT {"time_ns"}` sets the wall clock, `{"step_ns"}` moves it. The answer has the new time."""
DAEMON_HOSTS: Final = "/v1/daemon/hosts"
"""`PUT {"hosts": {NAME: ADDRESS}}`: replaces the daemon's part of `/etc/hosts`."""
DAEMON_VOLUMES: Final = "/v1/daemon/volumes"
"""`PUT {"volumes": [GuestVolume]}`: mounts those that are not mounted yet, in this order, and grows each filesystem to
the size of its disk. 409: one can't be mounted, and why."""
DAEMON_SECRETS: Final = "/v1/daemon/secrets"
"""`PUT` a `GuestSecrets`: puts files into memory, and adds variables to the environment of the workload, and of
commands if the manifest has `exec`. It precedes both, and a clone's `Identity`. `GET` and `PUT` answer with the
`{"boot"}` for which the values were sent, or null. 409: a file can't be created, and why."""
DAEMON_SETTLE: Final = "/v1/daemon/settle"
"""`POST`: prepares the guest for becoming a template. Waits until the guest is set up and has written everything."""
CLONE_FILE: Final = "/run/volant-clone.json"
"""The identity of a clone, for programs in it: `instance_id`, `hostname`, `machine_id`, `vm_id`, `time_ns`."""
MANIFEST_FILE: Final = "/run/volant-manifest.json"
"""The manifest, for programs in the guest."""
MANIFEST_VARIABLE: Final = "VOLANT_MANIFEST"
"""The environment variable with the path of `MANIFEST_FILE`."""
DAEMON_WATCH: Final = "/v1/daemon/watch"
"""`GET`: NDJSON with the `WorkloadStatus` now and at each change of `state`, `pid` or `restarts`, until the client
leaves."""
DAEMON_LOGS: Final = "/v1/daemon/logs"
"""`GET ?stdout=POS&stderr=POS`: log frames from those positions on (default 0), until the client leaves or the guest
shuts down. One reader at a time: a new one replaces the old one. After a restart of the agent, the header
`Volant-Log-Id` of the answer and all positions are new."""
DAEMON_SHUTDOWN: Final = "/v1/daemon/shutdown"
DAEMON_ROOT: Final = "/v1/daemon/root"
"""`GET`: the state of the root filesystem, `{"state": "none"|"pending"|"mounted"|"failed", "detail"}`. Waits some time
for the guest to be set up."""

ROOT_PARAMETER: Final = "volant.root"
"""The kernel parameter with the serial number of the root filesystem's disk."""
ROOT_SERIAL: Final = "volant-root"
IMAGE_PARAMETER: Final = "volant.image"
"""The kernel parameter with the serial number of the disk with an OCI image, which the guest mounts below the root
filesystem's disk, as an overlay."""
IMAGE_SERIAL: Final = "volant-image"
NETWORK_PARAMETER: Final = "volant.net"
"""The kernel parameter with the settings of the NIC: `ADDRESS/PREFIX,GATEWAY,MAC`."""
NAMESERVERS_PARAMETER: Final = "volant.dns"
"""The kernel parameter with the DNS servers: addresses, separated by commas."""

LOG_ID_HEADER: Final = "Volant-Log-Id"
LOG_CONTENT_TYPE: Final = "application/vnd.volant.log"

HOP_BY_HOP: Final = frozenset(
    (
        *(b"connection", b"keep-alive", b"te", b"upgrade"),
        *(b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
    )
)
"""Header fields of one connection, which relays do not pass on."""
MAX_HEAD_BYTES: Final = 64 * 1024
"""Maximum length of the head of a request or of a workload's answer."""
MAX_JSON_BYTES: Final = 1024 * 1024
"""Maximum length of a body of the agent's own routes."""
MAX_STREAMS: Final = 128
"""Maximum number of open streams; the next one is answered with 503. `/healthz` and the daemon's routes have
`RESERVED_STREAMS` more."""
RESERVED_STREAMS: Final = 16
DEFAULT_GRACE_S: Final = 10.0
MAX_GRACE_S: Final = 600.0
RING_BYTES: Final = 1024 * 1024
"""Bytes that the agent keeps of each of the workload's streams."""

FRAME_STDOUT: Final = 1
FRAME_STDERR: Final = 2
FRAME_STDOUT_GAP: Final = 3
FRAME_STDERR_GAP: Final = 4
MAX_FRAME_BYTES: Final = 64 * 1024
"""Maximum length of the data in one frame."""

DEFAULT_STOP_SIGNAL: Final = "SIGTERM"
MAX_USER_CHARACTERS: Final = 256

LOG_HEADER: Final = struct.Struct("!BQQI")
"""Kind, position, wall clock in nanoseconds, length of the data that follows."""
_GAP: Final = struct.Struct("!Q")


def signal_number(text: str) -> int | None:
    """Returns the number of a signal: `SIGINT`, `INT`, `SIGRTMIN+3` or `2`; None if there is no such signal."""
    if text.isascii() and text.isdecimal():
        number = int(text) if len(text) < 4 else 0
        return number if 1 <= number <= signal.SIGRTMAX else None
    name = text.upper().removeprefix("SIG")
    base, sign, offset = name[:5], name[5:6], name[6:]
    if base in ("RTMIN", "RTMAX") and sign in ("", "+", "-"):
        if sign and not (offset.isascii() and offset.isdecimal() and len(offset) < 3):
            return None
        number = int(getattr(signal, f"SIG{base}")) + int(f"{sign}{offset}" if sign else "0")
        return number if signal.SIGRTMIN <= number <= signal.SIGRTMAX else None
    found = signal.Signals.__members__.get(f"SIG{name}")
    return None if found is None else int(found)


def encode_log_frame(kind: int, position: int, time_ns: int, data: bytes) -> bytes:
    """Returns an encoded log frame."""
    return LOG_HEADER.pack(kind, position, time_ns, len(data)) + data


def encode_gap(kind: int, position: int, time_ns: int, length: int) -> bytes:
    """Returns the frame of a gap: `length` lost bytes from `position` on. `kind` is one of the gaps."""
    return encode_log_frame(kind, position, time_ns, _GAP.pack(length))


def gap_length(data: bytes) -> int:
    """Returns the number of lost bytes in a gap's data.

    :raises ValueError: the data is malformed
    """
    if len(data) != _GAP.size:
        raise ValueError(f"a gap has {len(data)} bytes of data instead of {_GAP.size}")
    length: int = _GAP.unpack(data)[0]
    return length


class LogDecoder:
    """Decodes log frames from a stream of bytes.

    A guest is not trusted, so the decoder is strict and bounded: it holds less than one frame of at most
    `MAX_FRAME_BYTES`, and raises at the first malformed one.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, int, bytes]]:
        """Adds the next bytes, and returns the complete frames as the fields of a `LogFrame`.

        :raises ValueError: a frame is malformed; nothing after it can be decoded
        """
        self._buffer += data
        frames: list[tuple[int, int, int, bytes]] = []
        start = 0
        size = LOG_HEADER.size
        while len(self._buffer) - start >= size:
            kind, position, time_ns, length = LOG_HEADER.unpack_from(self._buffer, start)
            if not FRAME_STDOUT <= kind <= FRAME_STDERR_GAP:
                raise ValueError(f"a log frame has the unknown kind {kind}")
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a log frame has {length} bytes, more than {MAX_FRAME_BYTES}")
            if kind >= FRAME_STDOUT_GAP and length != _GAP.size:
                raise ValueError(f"a gap has {length} bytes of data instead of {_GAP.size}")
            if len(self._buffer) - start < size + length:
                break
            body = start + size
            frames.append((kind, position, time_ns, bytes(self._buffer[body : body + length])))
            start = body + length
        del self._buffer[:start]
        return frames

    @property
    def pending(self) -> int:
        """The number of bytes of an incomplete frame."""
        return len(self._buffer)
