"""What makes a clone somebody: its own clock, entropy, names and ids.

A guest that goes on from a template has everything that the template had, and so have its siblings. Before it is used,
the daemon says who it is. `docs/explanation/templates.md` has what differs between clones then, and what does not.
"""

# ruff: noqa: PTH123, PTH208 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from volant.model import agent

from . import _root, _rootfs
from ._exec import check_number, decode_json
from ._http import Gone, Problem, has_left

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._http import Request, Stream
    from ._network import Settings
    from ._output import Output
    from ._plugin import Plugin
    from ._workload import Workload

_NAMES = {"hostname", "machine_id", "entropy", "time_ns", "vm_id"}
_FIELDS = _NAMES | {"signal", "manifest", "workload", "network", "as_it_is"}
_NETWORK_FIELDS = {"mac", "address", "prefix", "gateway", "nameservers", "hosts"}
_SIGNALS = {"SIGHUP": signal.SIGHUP, "SIGUSR1": signal.SIGUSR1, "SIGUSR2": signal.SIGUSR2}
_MIN_ENTROPY, _MAX_ENTROPY = 64, 512
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_WELL_S = 6.0
"""How long a workload that was copied may take until its check passes."""
_MAX_STEP_NS = 3600 * 10**9
_HEX = frozenset("0123456789abcdef")
_MACHINE_ID = "/etc/machine-id"
_BALLOON = "/sys/bus/virtio/drivers/virtio_balloon"

_lock = threading.Lock()
_writing_names = threading.Lock()
_known = ""
_begun_for = ""
"""The machine that was last told who it is, and what runs in it with that."""


def instance_id() -> str:
    """Return an id that no other boot and no other clone has."""
    global _known
    with _lock:
        if not _known:
            _known = _written() or os.urandom(16).hex()
        return _known


def serve_identity(stream: Stream, request: Request, output: Output, workload: Workload, plugin: Plugin) -> None:
    """Answer `PUT /v1/daemon/identity`; :raises Problem: 400 malformed, 409 the guest has another workload, 500 it
    can't be done, 503 the workload is not well."""
    global _begun_for
    import json

    from ._workload import spec_of

    value = decode_json(stream.read_body(request), _FIELDS)
    now = _time_of(value)
    hostname, machine_id, entropy = _hostname_of(value), _machine_id_of(value), _entropy_of(value)
    number = _signal_of(value)
    vm_id = int(check_number(value.get("vm_id"), "vm_id", 0, 2**53))
    spec = spec_of(value["workload"]) if "workload" in value else None
    network = _network_of(value["network"]) if "network" in value else None
    as_it_is = _flag_of(value, "as_it_is")
    if "manifest" in value:
        plugin.take(value["manifest"], json.dumps(value["manifest"]).encode())
    try:
        step_clock(now)
        add_entropy(entropy)
        set_hostname(hostname)
        if network is not None:
            set_network(hostname, *network)
        identifier = os.urandom(16).hex()
        told: dict[str, object] = {
            "instance_id": identifier,
            "hostname": hostname,
            "machine_id": machine_id,
            "vm_id": vm_id,
            "time_ns": time.time_ns(),
        }
        text = json.dumps(told).encode() + b"\n"
        _write(machine_id, text)
    except OSError as error:
        raise Problem(500, f"the guest can't become what it should be: {error}") from None
    _become(identifier, output)
    # One that was begun for this very machine, and the answer was lost, is no copy.
    why = workload.is_copied(number, None if as_it_is else _WELL_S) if _begun_for != machine_id else ""
    if why and not as_it_is:
        raise Problem(503, f"the workload is not well in the clone: {why}")
    if spec is not None:
        workload.begin(spec, plugin)
    _begun_for = machine_id
    answer = {
        "instance_id": identifier,
        "protocol": {"min": agent.PROTOCOL_MIN, "max": agent.PROTOCOL_VERSION},
        "time_ns": time.time_ns(),
    }
    stream.answer(200, json.dumps(answer).encode() + b"\n")
    threading.Thread(target=keep_freed_memory, name="balloon", daemon=True).start()


def serve_clock(stream: Stream, request: Request) -> None:
    """Answer `PUT /v1/daemon/clock`, which sets the clock, or moves it by `step_ns`; :raises Problem: 400 malformed,
    500 it can't be set."""
    import json

    wanted = decode_json(stream.read_body(request), {"time_ns", "step_ns"})
    try:
        if "step_ns" not in wanted:
            step_clock(_time_of(wanted))
        elif step := _step_of(wanted):
            step_clock(time.time_ns() + step)
    except OSError as error:
        raise Problem(500, f"the clock can't be set: {error}") from None
    stream.answer(200, json.dumps({"time_ns": time.time_ns()}).encode() + b"\n")


def serve_hosts(stream: Stream, request: Request) -> None:
    """Answer `PUT /v1/daemon/hosts`; :raises Problem: 400 malformed, 500 it can't be done; :raises Gone: the client has
    left, and nothing was done."""
    from . import _network

    wanted = decode_json(stream.read_body(request), {"hosts"})
    names = _hosts_of(wanted.get("hosts"))
    with _writing_names:
        # Who has left may have asked again since, with something newer.
        if has_left(stream.sock):
            raise Gone
        try:
            names = {**_network.own_names(), **names}
            _everywhere(lambda: _network.write_hosts(names))
        except OSError as error:
            raise Problem(500, f"the names can't be written: {error}") from None
    stream.answer(200, b"{}\n")


def settle() -> None:
    """Be done with everything that a clone would have to do otherwise, and have nothing left to write."""
    from . import _exec_session, _exec_sessions, _files, _network, _relay, _websocket

    del _exec_session, _exec_sessions, _files, _network, _relay, _websocket
    import gc
    import json
    import subprocess

    del json, subprocess
    gc.collect()
    # What is there now stays. Looked through by each collection, its pages would be copied in every clone.
    gc.freeze()
    os.sync()


# What is done to the kernel


def step_clock(now_ns: int) -> None:
    """Set the time of day; :raises OSError:"""
    time.clock_settime_ns(time.CLOCK_REALTIME, now_ns)


def add_entropy(entropy: bytes) -> None:
    """Give the kernel entropy, and let it draw on it at once; :raises OSError:"""
    import fcntl
    import struct

    fd = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", 8 * len(entropy), len(entropy)) + entropy)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def set_hostname(name: str) -> None:
    """:raises OSError:"""
    import socket

    socket.sethostname(name)


def set_network(hostname: str, settings: Settings, nameservers: list[str] | None, hosts: dict[str, str]) -> None:
    """:raises OSError:"""
    from . import _network

    _network.apply(settings)
    names = {hostname: settings.address, **hosts}

    def write() -> None:
        _network.write_hosts(names)
        if nameservers is not None:
            _network.write_nameservers(nameservers)

    _everywhere(write)


def keep_freed_memory() -> None:
    """Give the host nothing back any more: a copy's memory is that of its original, of which nothing can be returned,
    and QEMU would say so each time."""
    try:
        for name in os.listdir(_BALLOON):
            if name.startswith("virtio"):
                with open(f"{_BALLOON}/unbind", "w") as handle:
                    handle.write(name)
    except OSError:
        pass  # there is no balloon


# What is done to files and to the agent


def _write(machine_id: str, told: bytes) -> None:
    """Write the files of a clone."""

    text = machine_id.encode() + b"\n"

    def write() -> None:
        _rootfs.replace(agent.CLONE_FILE, told)
        if _rootfs.overwrite(_MACHINE_ID, text):
            return
        try:
            _rootfs.replace(_MACHINE_ID, text)
        except FileNotFoundError:
            pass  # a root filesystem without /etc has no machine id to share

    _everywhere(write)


def _everywhere(write: Callable[[], None]) -> None:
    """Write something to the initramfs, and to the root filesystem if there is one."""
    write()
    if _root.root() != "/":
        _root.inside(write)


def _become(identifier: str, output: Output) -> None:
    global _known
    with _lock:
        _known = identifier
    output.rename(identifier)
    generator = sys.modules.get("random")
    if generator is not None:
        generator.seed()


def _written() -> str:
    """Return what an agent before this one was told, in this very clone."""
    import json

    try:
        with open(agent.CLONE_FILE) as handle:
            found = json.loads(handle.read(4096)).get("instance_id")
    except (OSError, ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""


# What is taken


def _time_of(value: dict[str, Any]) -> int:
    now = value.get("time_ns")
    if isinstance(now, bool) or not isinstance(now, int) or not 0 < now < 2**63:
        raise Problem(400, "time_ns is no time", field="time_ns")
    return now


def _step_of(value: dict[str, Any]) -> int:
    step = value["step_ns"]
    if isinstance(step, bool) or not isinstance(step, int) or not -_MAX_STEP_NS <= step <= _MAX_STEP_NS:
        raise Problem(400, "step_ns is no step", field="step_ns")
    return step


def _hostname_of(value: dict[str, Any]) -> str:
    name = value.get("hostname")
    if not isinstance(name, str) or not 0 < len(name) < 64 or not name.isascii() or not name.replace("-", "").isalnum():
        raise Problem(400, "hostname is none", field="hostname")
    return name


def _flag_of(value: dict[str, Any], name: str) -> bool:
    flag = value.get(name, False)
    if not isinstance(flag, bool):
        raise Problem(400, f"{name} is neither true nor false", field=name)
    return flag


def _machine_id_of(value: dict[str, Any]) -> str:
    name = value.get("machine_id")
    if not isinstance(name, str) or len(name) != 32 or not _HEX.issuperset(name):
        raise Problem(400, "machine_id has not 32 hexadecimal digits", field="machine_id")
    return name


def _entropy_of(value: dict[str, Any]) -> bytes:
    import binascii

    text = value.get("entropy")
    try:
        entropy = binascii.a2b_base64(text, strict_mode=True) if isinstance(text, str) else b""
    except ValueError:
        entropy = b""
    if not _MIN_ENTROPY <= len(entropy) <= _MAX_ENTROPY:
        raise Problem(400, f"entropy is no base64 of {_MIN_ENTROPY} to {_MAX_ENTROPY} bytes", field="entropy")
    return entropy


def _signal_of(value: dict[str, Any]) -> signal.Signals | None:
    name = value.get("signal")
    if name is None:
        return None
    if not isinstance(name, str) or name not in _SIGNALS:
        raise Problem(400, f"signal is none of {', '.join(_SIGNALS)}", field="signal")
    return _SIGNALS[name]


def _network_of(value: object) -> tuple[Settings, list[str] | None, dict[str, str]]:
    from ._network import Settings, check_address

    if not isinstance(value, dict) or not value.keys() <= _NETWORK_FIELDS:
        raise Problem(400, f"network has other fields than {', '.join(sorted(_NETWORK_FIELDS))}", field="network")
    prefix, nameservers = value.get("prefix"), value.get("nameservers")
    texts = [text for name in ("address", "gateway", "mac") if isinstance(text := value.get(name), str)]
    try:
        if type(prefix) is not int or len(texts) != 3:
            raise ValueError("network lacks address, prefix, gateway or mac")
        settings = Settings(texts[0], prefix, texts[1], texts[2])
        if nameservers is not None:
            if not isinstance(nameservers, list) or not all(isinstance(each, str) for each in nameservers):
                raise ValueError("nameservers is no list of addresses")
            nameservers = [check_address(each, "a name server") for each in nameservers]
    except ValueError as error:
        raise Problem(400, str(error), field="network") from None
    return settings, nameservers, _hosts_of(value.get("hosts", {}))


def _hosts_of(value: object) -> dict[str, str]:
    from ._network import check_address, check_name

    try:
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise ValueError("hosts has no addresses by name")
        return {check_name(name): check_address(address, f"what {name} has") for name, address in value.items()}
    except ValueError as error:
        raise Problem(400, str(error), field="hosts") from None
