"""The guest's network interface, and whom it knows by name.

PID 1 does what the kernel's command line says, as Debian's kernel ignores `ip=`; a copy is told by the daemon, with the
rest of who it is (`_identity.py`). Both by ioctls, so no program is started and next to nothing imported. A guest
without a NIC never comes here.

**Asleep in a template.** Where the command line says nothing, the driver is loaded and has no NIC. So nothing is
negotiated yet: the NIC of each clone begins with the MAC and the abilities that it has there, whatever was behind the
template's, and there was no address in the template to speak with.
"""

# ruff: noqa: PTH110, PTH123, PTH208 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import _socket
import fcntl
import os
import struct

from . import _rootfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_SIOCADDRT = 0x890B
_SIOCGIFADDR = 0x8915
_SIOCSIFADDR = 0x8916
_SIOCSIFFLAGS = 0x8914
_SIOCSIFNETMASK = 0x891C
_SIOCSIFHWADDR = 0x8924
_UP = 0x1 | 0x40  # IFF_UP | IFF_RUNNING
_ETHERNET = 1
_GATEWAY = 0x1 | 0x2  # RTF_UP | RTF_GATEWAY

_CARDS = "/sys/class/net"
_BUS = "/sys/bus/virtio"
_VIRTIO_NET = 1
_ARP_NOTIFY = "/proc/sys/net/ipv4/conf/{}/arp_notify"
_BEGIN = "# What follows is Volant's, and written anew with each change."
_END = "# Until here."
_MAX_HOSTS = 1024 * 1024
"""The longest file of somebody else's that names are added to."""


class Settings:
    """What a NIC is to have, checked. :raises ValueError: with what is wrong."""

    def __init__(self, address: str, prefix: int, gateway: str, mac: str) -> None:
        if not 1 <= prefix <= 30:
            raise ValueError(f"prefix {prefix} is not from 1 to 30")
        self.address = check_address(address, "address")
        self.prefix = prefix
        self.gateway = check_address(gateway, "gateway")
        differ = int.from_bytes(_packed(address), "big") ^ int.from_bytes(_packed(gateway), "big")
        if not differ or differ >> (32 - prefix):
            raise ValueError(f"gateway {gateway} is no neighbour of {address}/{prefix}")
        octets = mac.split(":")
        if len(octets) != 6 or any(len(octet) != 2 or not _is_hex(octet) for octet in octets):
            raise ValueError("mac has not six pairs of hexadecimal digits")
        self.mac = bytes(int(octet, 16) for octet in octets)
        if self.mac[0] & 1 or not any(self.mac):
            raise ValueError("mac is no NIC's")


def check_address(text: str, what: str) -> str:
    """Return an IPv4 address; :raises ValueError: it is none."""
    try:
        _packed(text)
    except (OSError, ValueError):
        raise ValueError(f"{what} is no IPv4 address") from None
    return text


def check_name(text: str) -> str:
    """Return a host's name; :raises ValueError: it is none."""
    if not 0 < len(text) < 64 or not text.isascii() or not text.replace("-", "").replace(".", "").isalnum():
        raise ValueError(f"{text[:80]!r} is no host's name")
    return text


def boot(network: str, nameservers: str, load_driver: Callable[[], None], say: Callable[[str], None]) -> None:
    """Do what the kernel's command line says; called by PID 1. `say` says something on the console."""
    try:
        if not network:
            _asleep(load_driver)
            return
        load_driver()
        address, gateway, mac = network.split(",")
        address, _, prefix = address.partition("/")
        apply(Settings(address, int(prefix), gateway, mac))
        names = {os.uname().nodename: address}
        asked = [check_address(each, "a name server") for each in nameservers.split(",") if each]
        _write(names, asked)
        if os.path.ismount(_rootfs.ROOT) and not _in_child(_rootfs.ROOT, lambda: _write(names, asked)):
            say("the root filesystem has not been told of the network")
    except (OSError, ValueError) as error:
        say(f"the network can't be set up: {error}")


def apply(settings: Settings) -> None:
    """Give the NIC its addresses, the route, and nothing that it had before, and let it speak. :raises OSError:"""
    name = _nic() or _wake()
    if not name:
        raise OSError("the guest has no network interface")
    label = name.encode()
    mask = (0xFFFFFFFF << (32 - settings.prefix)) & 0xFFFFFFFF
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:

        def ask(request: int, form: str, *values: object) -> None:
            fcntl.ioctl(control.fileno(), request, struct.pack(form, *values))

        # What the NIC was before goes with it: routes, neighbours, and what waits to be sent.
        ask(_SIOCSIFFLAGS, "16sH22x", label, 0)
        ask(_SIOCSIFHWADDR, "16sH6s16x", label, _ETHERNET, settings.mac)
        ask(_SIOCSIFADDR, "16s16s8x", label, _sockaddr(_packed(settings.address)))
        ask(_SIOCSIFNETMASK, "16s16s8x", label, _sockaddr(mask.to_bytes(4, "big")))
        # Whoever knew this address may have known it as another guest's.
        with open(_ARP_NOTIFY.format(name), "w") as handle:
            handle.write("1")
        ask(_SIOCSIFFLAGS, "16sH22x", label, _UP)
        anywhere = _sockaddr(bytes(4))
        route = (0, anywhere, _sockaddr(_packed(settings.gateway)), anywhere, _GATEWAY, 0, 0, 0, 0, 0, 0, 0, 0)
        ask(_SIOCADDRT, "L16s16s16sHhLPhPLLH", *route)
    finally:
        control.close()


def own_names() -> dict[str, str]:
    """Return the guest's name with its address; nothing, as long as it has none."""
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        answer = fcntl.ioctl(control.fileno(), _SIOCGIFADDR, struct.pack("16s24x", _nic().encode()))
    except OSError:
        return {}
    finally:
        control.close()
    return {os.uname().nodename: _socket.inet_ntop(_socket.AF_INET, answer[20:24])}


def write_hosts(names: Mapping[str, str]) -> None:
    """Replace the daemon's part of `/etc/hosts` and leave the rest; where there is no `/etc`, nobody looks for it.
    :raises OSError:"""
    try:
        with open("/etc/hosts", "rb") as handle:
            before = handle.read(_MAX_HOSTS + 1)
    except FileNotFoundError:
        before = b""
    if len(before) > _MAX_HOSTS:
        raise OSError("/etc/hosts is longer than 1 MiB")
    _replace("/etc/hosts", hosts_text(before.decode("utf-8", "surrogateescape"), names))


def write_nameservers(addresses: Iterable[str]) -> None:
    """:raises OSError:"""
    _replace("/etc/resolv.conf", "".join(f"nameserver {each}\n" for each in addresses))


def hosts_text(before: str, names: Mapping[str, str]) -> str:
    """Return the text of `/etc/hosts` that knows `names`, and what `before` knew of others."""
    own, _, rest = before.partition(f"{_BEGIN}\n")
    others = own + rest.partition(f"{_END}\n")[2]
    if others and not others.endswith("\n"):
        others += "\n"
    lines = [f"{address} {name}" for name, address in names.items()]
    return others + "\n".join((_BEGIN, *lines, _END, ""))


def _write(names: Mapping[str, str], nameservers: list[str]) -> None:
    write_hosts(names)
    if nameservers:
        write_nameservers(nameservers)


def _replace(path: str, text: str) -> None:
    try:
        _rootfs.replace(path, text.encode("utf-8", "surrogateescape"), 0o644)
    except FileNotFoundError:
        pass


def _in_child(root: str, call: Callable[[], None]) -> bool:
    """Call something where `root` is `/`: no link in there leads out. Return whether that went well."""
    pid = os.fork()
    if not pid:
        try:
            os.chroot(root)
            os.chdir("/")
            call()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def _asleep(load_driver: Callable[[], None]) -> None:
    """Load the driver, and let it have no NIC."""
    with open(f"{_BUS}/drivers_autoprobe", "w") as handle:
        handle.write("0")
    try:
        load_driver()
    finally:
        with open(f"{_BUS}/drivers_autoprobe", "w") as handle:
            handle.write("1")


def _wake() -> str:
    """Give the driver the NIC that it was not to have; return its name. :raises OSError:"""
    for name in sorted(os.listdir(f"{_BUS}/devices")):
        with open(f"{_BUS}/devices/{name}/device") as handle:
            is_nic = int(handle.read(16), 16) == _VIRTIO_NET
        if is_nic:
            with open(f"{_BUS}/drivers/virtio_net/bind", "w") as handle:
                handle.write(name)
    return _nic()


def _nic() -> str:
    """Return the name of the NIC, which is the only one with a device; an empty text without one."""
    return next((name for name in sorted(os.listdir(_CARDS)) if os.path.exists(f"{_CARDS}/{name}/device")), "")


def _packed(address: str) -> bytes:
    return _socket.inet_pton(_socket.AF_INET, address)


def _sockaddr(address: bytes) -> bytes:
    return struct.pack("H2x4s8x", _socket.AF_INET, address)


def _is_hex(text: str) -> bool:
    return not text.strip("0123456789abcdefABCDEF")
