"""Assigns an identity to a clone: its clock, entropy, names and ids.

All guests that were restored from a template have the same memory. Before such a guest is used, the daemon sends its
identity. `docs/explanation/templates.md` lists the differences between clones afterwards.
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
from ._checks import check_base64, check_flag, check_integer, decode_json
from ._http import Gone, Problem
from ._watch import has_left

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._http import Request
    from ._network import Interface
    from ._output import Output
    from ._plugin import Plugin
    from ._stream import Stream
    from ._workload import Workload

_NAMES = {"hostname", "machine_id", "entropy", "time_ns", "vm_id"}
_FIELDS = _NAMES | {"signal", "manifest", "workload", "network", "as_it_is"}
_NETWORK_FIELDS = {"mac", "address", "prefix", "gateway", "nameservers", "hosts"}
_SIGNALS = {"SIGHUP": signal.SIGHUP, "SIGUSR1": signal.SIGUSR1, "SIGUSR2": signal.SIGUSR2}
_MIN_ENTROPY, _MAX_ENTROPY = 64, 512
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_HEALTHY_S = 6.0
"""How long a copied workload may take until its health check passes."""
_MAX_STEP_NS = 3600 * 10**9
_HEX = frozenset("0123456789abcdef")
_MACHINE_ID = "/etc/machine-id"
_BALLOON = "/sys/bus/virtio/drivers/virtio_balloon"

_lock = threading.Lock()
_writing_hosts = threading.Lock()
_instance_id = ""
_notified_for = ""
"""The machine id for which the workload was last notified."""


def instance_id() -> str:
    """Returns an id that is unique to this boot or clone."""
    global _instance_id
    with _lock:
        if not _instance_id:
            _instance_id = _read_clone_file() or os.urandom(16).hex()
        return _instance_id


def serve_identity(stream: Stream, request: Request, output: Output, workload: Workload, plugin: Plugin) -> None:
    """Answers `PUT /v1/daemon/identity`.

    :raises Problem: 400, malformed; 409, the guest has another workload; 500, the system refuses; 503, the workload is
        not healthy
    """
    global _notified_for
    import json

    from ._workload import check_spec

    value = decode_json(stream.read_body(request), _FIELDS)
    now = _time_of(value)
    hostname, machine_id, entropy = _hostname_of(value), _machine_id_of(value), _entropy_of(value)
    number = _signal_of(value)
    vm_id = check_integer(value.get("vm_id"), "vm_id", 0, 2**53)
    spec = check_spec(value["workload"]) if "workload" in value else None
    network = _network_of(value["network"]) if "network" in value else None
    as_it_is = check_flag(value.get("as_it_is", False), "as_it_is")
    if "manifest" in value:
        plugin.take(value["manifest"], json.dumps(value["manifest"]).encode())
    try:
        step_clock(now)
        add_entropy(entropy)
        set_hostname(hostname)
        if network is not None:
            set_network(hostname, *network)
        identifier = os.urandom(16).hex()
        facts: dict[str, object] = {
            "instance_id": identifier,
            "hostname": hostname,
            "machine_id": machine_id,
            "vm_id": vm_id,
            "time_ns": time.time_ns(),
        }
        _write_files(machine_id, json.dumps(facts).encode() + b"\n")
    except OSError as error:
        raise Problem(500, f"the guest can't take its identity: {error}") from None
    _assign_instance(identifier, output)
    # The daemon repeats a request whose answer was lost. The workload then began as this machine and is no copy.
    why = ""
    if _notified_for != machine_id:
        why = workload.notify_copied(number, None if as_it_is else _HEALTHY_S)
    if why and not as_it_is:
        raise Problem(503, f"the workload is not well in the clone: {why}")
    if spec is not None:
        workload.begin(spec, plugin)
    _notified_for = machine_id
    answer = {
        "instance_id": identifier,
        "protocol": {"min": agent.PROTOCOL_MIN, "max": agent.PROTOCOL_VERSION},
        "time_ns": time.time_ns(),
    }
    stream.answer(200, json.dumps(answer).encode() + b"\n")
    threading.Thread(target=keep_freed_memory, name="balloon", daemon=True).start()


def serve_clock(stream: Stream, request: Request) -> None:
    """Answers `PUT /v1/daemon/clock`: sets the clock to `time_ns`, or moves it by `step_ns`.

    :raises Problem: 400, malformed; 500, the system refuses
    """
    import json

    wanted = decode_json(stream.read_body(request), {"time_ns", "step_ns"})
    try:
        if "step_ns" not in wanted:
            step_clock(_time_of(wanted))
        elif step := check_integer(wanted["step_ns"], "step_ns", -_MAX_STEP_NS, _MAX_STEP_NS):
            step_clock(time.time_ns() + step)
    except OSError as error:
        raise Problem(500, f"the clock can't be set: {error}") from None
    stream.answer(200, json.dumps({"time_ns": time.time_ns()}).encode() + b"\n")


def serve_hosts(stream: Stream, request: Request) -> None:
    """Answers `PUT /v1/daemon/hosts`.

    :raises Problem: 400, malformed; 500, the system refuses
    :raises Gone: the client has disconnected, and nothing was written
    """
    from . import _network

    wanted = decode_json(stream.read_body(request), {"hosts"})
    names = _hosts_of(wanted.get("hosts"))
    with _writing_hosts:
        # A client that has left may have sent newer names since.
        if has_left(stream.sock):
            raise Gone
        try:
            names = {**_network.own_names(), **names}
            _in_both_roots(lambda: _network.write_hosts(names))
        except OSError as error:
            raise Problem(500, f"the names can't be written: {error}") from None
    stream.answer(200, b"{}\n")


def settle() -> None:
    """Prepares the guest for a snapshot: imports modules that every clone will need, and writes all data to the
    disk."""
    from . import _exec, _exec_sessions, _files, _network, _relay, _secrets

    del _exec, _exec_sessions, _files, _network, _relay, _secrets
    import gc
    import json
    import subprocess

    del json, subprocess
    gc.collect()
    # A garbage collection writes to all objects, which would copy their pages in every clone.
    gc.freeze()
    os.sync()


# Changes to the kernel


def step_clock(now_ns: int) -> None:
    """Sets the time of day. :raises OSError: the system refuses."""
    time.clock_settime_ns(time.CLOCK_REALTIME, now_ns)


def add_entropy(entropy: bytes) -> None:
    """Adds entropy to the kernel's generator, and reseeds it. :raises OSError: the system refuses."""
    import fcntl
    import struct

    fd = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", 8 * len(entropy), len(entropy)) + entropy)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def set_hostname(name: str) -> None:
    """Sets the host name. :raises OSError:"""
    import socket

    socket.sethostname(name)


def set_network(hostname: str, interface: Interface, nameservers: list[str] | None, hosts: dict[str, str]) -> None:
    """Sets the network interface and its names. :raises OSError:"""
    from . import _network

    _network.apply(interface)
    names = {hostname: interface.address, **hosts}

    def write() -> None:
        _network.write_hosts(names)
        if nameservers is not None:
            _network.write_nameservers(nameservers)

    _in_both_roots(write)


def keep_freed_memory() -> None:
    """Unbinds the balloon, which returns freed memory to the host: QEMU can't return memory that a copy shares with its
    template, and would log each attempt."""
    try:
        for name in os.listdir(_BALLOON):
            if name.startswith("virtio"):
                with open(f"{_BALLOON}/unbind", "w") as handle:
                    handle.write(name)
    except OSError:
        pass  # there is no balloon


# Changes to files and to the agent


def _write_files(machine_id: str, facts: bytes) -> None:
    text = machine_id.encode() + b"\n"

    def write() -> None:
        _rootfs.replace(agent.CLONE_FILE, facts)
        if _rootfs.overwrite(_MACHINE_ID, text):
            return
        try:
            _rootfs.replace(_MACHINE_ID, text)
        except FileNotFoundError:
            pass  # a root filesystem without /etc has no machine id

    _in_both_roots(write)


def _in_both_roots(write: Callable[[], None]) -> None:
    """Calls `write` in the initramfs, and in the root filesystem if there is one."""
    write()
    if _root.root() != "/":
        _root.inside(write)


def _assign_instance(identifier: str, output: Output) -> None:
    global _instance_id
    with _lock:
        _instance_id = identifier
    output.rename(identifier)
    generator = sys.modules.get("random")
    if generator is not None:
        generator.seed()


def _read_clone_file() -> str:
    """Returns the instance id that this clone received before its agent was restarted."""
    import json

    try:
        with open(agent.CLONE_FILE) as handle:
            found = json.loads(handle.read(4096)).get("instance_id")
    except (OSError, ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""


# Checks of the request


def _time_of(value: dict[str, Any]) -> int:
    return check_integer(value.get("time_ns"), "time_ns", 1, 2**63 - 1)


def _hostname_of(value: dict[str, Any]) -> str:
    name = value.get("hostname")
    if not isinstance(name, str) or not 0 < len(name) < 64 or not name.isascii() or not name.replace("-", "").isalnum():
        raise Problem(400, "hostname has not 1 to 63 letters, digits and hyphens", field="hostname")
    return name


def _machine_id_of(value: dict[str, Any]) -> str:
    name = value.get("machine_id")
    if not isinstance(name, str) or len(name) != 32 or not _HEX.issuperset(name):
        raise Problem(400, "machine_id has not 32 hexadecimal digits", field="machine_id")
    return name


def _entropy_of(value: dict[str, Any]) -> bytes:
    entropy = check_base64(value.get("entropy"), "entropy")
    if not _MIN_ENTROPY <= len(entropy) <= _MAX_ENTROPY:
        raise Problem(400, f"entropy has not {_MIN_ENTROPY} to {_MAX_ENTROPY} bytes", field="entropy")
    return entropy


def _signal_of(value: dict[str, Any]) -> signal.Signals | None:
    name = value.get("signal")
    if name is None:
        return None
    if not isinstance(name, str) or name not in _SIGNALS:
        raise Problem(400, f"signal is none of {', '.join(_SIGNALS)}", field="signal")
    return _SIGNALS[name]


def _network_of(value: object) -> tuple[Interface, list[str] | None, dict[str, str]]:
    from ._network import Interface, check_address

    if not isinstance(value, dict) or not value.keys() <= _NETWORK_FIELDS:
        raise Problem(400, f"network has other fields than {', '.join(sorted(_NETWORK_FIELDS))}", field="network")
    prefix, nameservers = value.get("prefix"), value.get("nameservers")
    texts = [text for name in ("address", "gateway", "mac") if isinstance(text := value.get(name), str)]
    try:
        if type(prefix) is not int or len(texts) != 3:
            raise ValueError("network lacks address, prefix, gateway or mac")
        interface = Interface(texts[0], prefix, texts[1], texts[2])
        if nameservers is not None:
            if not isinstance(nameservers, list) or not all(isinstance(each, str) for each in nameservers):
                raise ValueError("nameservers is not a list of addresses")
            nameservers = [check_address(each, "a name server") for each in nameservers]
    except ValueError as error:
        raise Problem(400, str(error), field="network") from None
    return interface, nameservers, _hosts_of(value.get("hosts", {}))


def _hosts_of(value: object) -> dict[str, str]:
    from ._network import check_address, check_name

    try:
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise ValueError("hosts has no addresses by name")
        return {check_name(name): check_address(address, f"the address of {name}") for name, address in value.items()}
    except ValueError as error:
        raise Problem(400, str(error), field="hosts") from None
