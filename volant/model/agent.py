"""What the host and the guest's agent say to each other: the one module that both sides import.

The guest has neither msgspec nor trio, so this is standard library alone, and as little of it as possible: every
import here is paid for in each boot. The JSON bodies are plain dictionaries; `agent_types.py` says what is in
them, and each side checks what it reads.

A request is one byte stream to `AGENT_PORT`, with one HTTP/1.1 exchange on it: no keep-alive, the stream ends with
the answer. Half-closing a stream is allowed and means nothing but "no more of the request"; a stream that is closed
or reset means that the client has left, and what it asked for is cancelled. `CONNECT 127.0.0.1:PORT` turns the
stream into a connection to the guest's loopback, on which a half close is passed on.

Versions: a daemon speaks to agents of guests that an older or newer one started, so each side says what it can do.
`/v1/info` gives `protocol: {"min", "max"}`; the highest version in both ranges holds. Within a version, fields may be
added to answers and must be ignored where unknown; requests with unknown fields are refused.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing is a slow import, and the guest needs none of it
    from typing import Final


PROTOCOL_MIN: Final = 1
PROTOCOL_VERSION: Final = 3
"""The newest version that this code speaks."""
TELLS_ALL_AT_ONCE: Final = 2
"""The version from which on an `Identity` may have `manifest` and `workload` with it."""
TELLS_NETWORK: Final = 3
TAKES_AS_IT_IS: Final = 3
"""The version from which on an `Identity` may say that the workload is taken as it is."""
"""The version from which on it may have `network`, and from which on there is `DAEMON_HOSTS`."""

AGENT_PORT: Final = 1024
"""The vsock port on which the agent listens; over virtio-serial, the `:authority` of the CONNECT."""
SERIAL_PORT_NAME: Final = "volant.agent.0"
"""The name of the virtio-serial port that carries the multiplexer."""

RESYNC_MAGIC: Final = b"volant-resync-1\n"
"""Ends the run of zero bytes with which a host that has just connected to the serial port asks for a fresh start."""
RESYNC_NONCE_BYTES: Final = 16
"""How many random bytes follow the magic; the agent sends them back before its first frame."""

HEALTHZ: Final = "/healthz"
AGENT_PREFIX: Final = "/v1/"
"""Beneath it, everything but `WORKLOAD_PREFIX` is the agent's own."""
INFO: Final = "/v1/info"
EXEC: Final = "/v1/exec"
"""`POST`: a command, its output as NDJSON. `GET`: a WebSocket to a command that is talked to; see `EXEC_SESSIONS`."""
EXEC_SESSIONS: Final = "/v1/exec/sessions"
"""`GET`: the commands that were begun with `GET /v1/exec?detach=true`. Beneath it each by its id: `GET`; `DELETE` kills
and forgets it; `GET /v1/exec?attach=ID&from=POSITION` goes on with it."""
FILES: Final = "/v1/files/"
"""Beneath it, each file and directory of the guest: `GET`, `HEAD`, `PUT` and `DELETE`."""
WORKLOAD_PREFIX: Final = "/v1/workload/"
"""`/v1/workload/x` is the workload's `/x`: how a workload's routes that the agent's hide are reached."""
DAEMON_PREFIX: Final = "/v1/daemon/"
"""For the daemon alone: its API must refuse to relay anything beneath it."""
DAEMON_WORKLOAD: Final = "/v1/daemon/workload"
"""`PUT` a `WorkloadSpec`: the same one again is fine, another one is a 409. `GET`: the `WorkloadStatus`."""
DAEMON_MANIFEST: Final = "/v1/daemon/manifest"
"""`PUT` the manifest of the VM's plugin, without `boot`. Older agents answer 404."""
DAEMON_IDENTITY: Final = "/v1/daemon/identity"
"""`PUT` an `Identity`, to a guest that goes on from a template and before anything else: answered with an `Identified`
once the guest is that. 500: it can't be; 503: its workload is not well."""
DAEMON_CLOCK: Final = "/v1/daemon/clock"
"""`PUT {"time_ns"}`: steps the wall clock; answered with what it shows."""
DAEMON_HOSTS: Final = "/v1/daemon/hosts"
"""`PUT {"hosts": {NAME: ADDRESS}}`: all that the guest is to know by name, in the daemon's part of `/etc/hosts`."""
DAEMON_SETTLE: Final = "/v1/daemon/settle"
"""`POST`: waits until the guest is set up and has nothing left to write, so that it can be made a template."""
CLONE_FILE: Final = "/run/volant-clone.json"
"""Where what runs in a clone finds who it is: `instance_id`, `hostname`, `machine_id`, `vm_id`, `time_ns`."""
MANIFEST_FILE: Final = "/run/volant-manifest.json"
"""Where what runs in the guest finds that."""
MANIFEST_VARIABLE: Final = "VOLANT_MANIFEST"
"""Tells the workload so."""
DAEMON_WATCH: Final = "/v1/daemon/watch"
"""`GET`: NDJSON, the `WorkloadStatus` now and at each change of `state`, `pid` or `restarts`, until the client
leaves."""
DAEMON_LOGS: Final = "/v1/daemon/logs"
"""`GET ?stdout=POS&stderr=POS`: log frames from those positions on (default 0), until the client leaves or the guest
shuts down. One reader at a time: a new one ends the one before. The answer's header `Volant-Log-Id` changes when the
agent has been restarted, and positions with it."""
DAEMON_SHUTDOWN: Final = "/v1/daemon/shutdown"
DAEMON_ROOT: Final = "/v1/daemon/root"
"""`GET`, waits a while for the guest to be set up: `{"state": "none"|"pending"|"mounted"|"failed", "detail"}`, what
became of the root filesystem."""

ROOT_PARAMETER: Final = "volant.root"
"""The kernel's parameter by which PID 1 is told to mount a root filesystem: the serial number of the block device."""
ROOT_SERIAL: Final = "volant-root"
NETWORK_PARAMETER: Final = "volant.net"
"""The one by which it is told what its NIC is to have: `ADDRESS/PREFIX,GATEWAY,MAC`."""
NAMESERVERS_PARAMETER: Final = "volant.dns"
"""And whom to ask for names: addresses, with commas in between."""

LOG_ID_HEADER: Final = "Volant-Log-Id"
LOG_CONTENT_TYPE: Final = "application/vnd.volant.log"

MAX_HEAD_BYTES: Final = 64 * 1024
"""The longest head of a request or of a workload's answer."""
MAX_JSON_BYTES: Final = 1024 * 1024
"""The longest body of the agent's own routes."""
MAX_STREAMS: Final = 128
"""Streams that may be open at once; the next is answered with 503. `/healthz` and the daemon's routes have
`RESERVED_STREAMS` more."""
RESERVED_STREAMS: Final = 16
DEFAULT_GRACE_S: Final = 10.0
MAX_GRACE_S: Final = 600.0
RING_BYTES: Final = 1024 * 1024
"""How much of each of the workload's streams the agent keeps."""

FRAME_STDOUT: Final = 1
FRAME_STDERR: Final = 2
FRAME_STDOUT_GAP: Final = 3
FRAME_STDERR_GAP: Final = 4
MAX_FRAME_BYTES: Final = 64 * 1024
"""The longest data of one frame."""

LOG_HEADER: Final = struct.Struct("!BQQI")
"""Kind, position, wall clock in nanoseconds, length of the data that follows."""
_GAP: Final = struct.Struct("!Q")


def encode_log_frame(kind: int, position: int, time_ns: int, data: bytes) -> bytes:
    """Return one frame as it goes over the wire."""
    return LOG_HEADER.pack(kind, position, time_ns, len(data)) + data


def encode_gap(kind: int, position: int, time_ns: int, length: int) -> bytes:
    """Return the frame that says that `length` bytes from `position` on are lost; `kind` is one of the gaps."""
    return encode_log_frame(kind, position, time_ns, _GAP.pack(length))


def gap_length(data: bytes) -> int:
    """Return how many bytes a gap says are lost; :raises ValueError: the gap is malformed."""
    if len(data) != _GAP.size:
        raise ValueError(f"a gap has {len(data)} bytes of data instead of {_GAP.size}")
    length: int = _GAP.unpack(data)[0]
    return length


class LogDecoder:
    """Cuts a stream of bytes into log frames.

    What it reads comes from a guest, so it is strict and bounded: it holds less than one frame of at most
    `MAX_FRAME_BYTES`, and raises at the first thing that is none.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, int, bytes]]:
        """Take the next bytes and return the frames that are whole now, as the fields of a `LogFrame`.

        :raises ValueError: this is no log; nothing after it can be read either
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
        """How many bytes of a frame have come whose rest has not."""
        return len(self._buffer)
