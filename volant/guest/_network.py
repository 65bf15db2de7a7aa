"""The guest's network interface, its `/etc/hosts` and its `/etc/resolv.conf`.

At a cold boot PID 1 reads the settings from the kernel's command line (Debian's kernel ignores `ip=`); a clone receives
them from the daemon with its identity. All settings are made with ioctls, without other programs and with few imports.

**In a template the interface is unbound.** The command line has no settings, and the driver is loaded without a device.
Each clone binds it later: the interface then starts with the clone's MAC address and the features of its own backend,
and no template ever has an address.
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

_INTERFACES = "/sys/class/net"
_BUS = "/sys/bus/virtio"
_VIRTIO_NET = 1
_ARP_NOTIFY = "/proc/sys/net/ipv4/conf/{}/arp_notify"
_BEGIN = "# What follows is Volant's, and written anew with each change."
_END = "# Until here."
_MAX_HOSTS = 1024 * 1024
"""Maximum size of a root filesystem's `/etc/hosts` to which names are added."""


class Interface:
    """Checked settings of the network interface."""

    def __init__(self, address: str, prefix: int, gateway: str, mac: str) -> None:
        """Creates it. :raises ValueError: a setting is wrong."""
        if not 1 <= prefix <= 30:
            raise ValueError(f"prefix {prefix} is not from 1 to 30")
        self.address = check_address(address, "address")
        self.prefix = prefix
        self.gateway = check_address(gateway, "gateway")
        differ = int.from_bytes(_packed(address), "big") ^ int.from_bytes(_packed(gateway), "big")
        if not differ or differ >> (32 - prefix):
            raise ValueError(f"gateway {gateway} is not in the network of {address}/{prefix}")
        octets = mac.split(":")
        if len(octets) != 6 or any(len(octet) != 2 or not _is_hex(octet) for octet in octets):
            raise ValueError("mac has not six pairs of hexadecimal digits")
        self.mac = bytes(int(octet, 16) for octet in octets)
        if self.mac[0] & 1 or not any(self.mac):
            raise ValueError("mac is a group address, or all zero")


def check_address(text: str, what: str) -> str:
    """Returns an IPv4 address. :raises ValueError: the text is not one."""
    try:
        _packed(text)
    except (OSError, ValueError):
        raise ValueError(f"{what} is not an IPv4 address") from None
    return text


def check_name(text: str) -> str:
    """Returns a host name. :raises ValueError: the text is not one."""
    if not 0 < len(text) < 64 or not text.isascii() or not text.replace("-", "").replace(".", "").isalnum():
        raise ValueError(f"{text[:80]!r} is not a host name")
    return text


def boot(network: str, nameservers: str, load_driver: Callable[[], None], say: Callable[[str], None]) -> None:
    """Configures the network from the kernel's command line; called by PID 1.

    :param say: writes to the console
    """
    try:
        if not network:
            _load_unbound(load_driver)
            return
        load_driver()
        address, gateway, mac = network.split(",")
        address, _, prefix = address.partition("/")
        apply(Interface(address, int(prefix), gateway, mac))
        names = {os.uname().nodename: address}
        asked = [check_address(each, "a name server") for each in nameservers.split(",") if each]
        _write(names, asked)
        if os.path.ismount(_rootfs.ROOT) and not _in_child(_rootfs.ROOT, lambda: _write(names, asked)):
            say("the root filesystem has no hosts and name servers")
    except (OSError, ValueError) as error:
        say(f"the network can't be set up: {error}")


def apply(interface: Interface) -> None:
    """Configures the interface and the default route, and drops earlier settings.

    :raises OSError: the system refuses, or there is no interface
    """
    name = _interface_name() or _bind()
    if not name:
        raise OSError("the guest has no network interface")
    label = name.encode()
    mask = (0xFFFFFFFF << (32 - interface.prefix)) & 0xFFFFFFFF
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:

        def ask(request: int, form: str, *values: object) -> None:
            fcntl.ioctl(control.fileno(), request, struct.pack(form, *values))

        # Setting it down drops its routes, its neighbours and the packets that wait.
        ask(_SIOCSIFFLAGS, "16sH22x", label, 0)
        ask(_SIOCSIFHWADDR, "16sH6s16x", label, _ETHERNET, interface.mac)
        ask(_SIOCSIFADDR, "16s16s8x", label, _sockaddr(_packed(interface.address)))
        ask(_SIOCSIFNETMASK, "16s16s8x", label, _sockaddr(mask.to_bytes(4, "big")))
        # Announce the address: peers may know it with another guest's MAC address.
        with open(_ARP_NOTIFY.format(name), "w") as handle:
            handle.write("1")
        ask(_SIOCSIFFLAGS, "16sH22x", label, _UP)
        anywhere = _sockaddr(bytes(4))
        route = (0, anywhere, _sockaddr(_packed(interface.gateway)), anywhere, _GATEWAY, 0, 0, 0, 0, 0, 0, 0, 0)
        ask(_SIOCADDRT, "L16s16s16sHhLPhPLLH", *route)
    finally:
        control.close()


def own_names() -> dict[str, str]:
    """Returns the guest's name and address; empty without an address."""
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        answer = fcntl.ioctl(control.fileno(), _SIOCGIFADDR, struct.pack("16s24x", _interface_name().encode()))
    except OSError:
        return {}
    finally:
        control.close()
    return {os.uname().nodename: _socket.inet_ntop(_socket.AF_INET, answer[20:24])}


def write_hosts(names: Mapping[str, str]) -> None:
    """Replaces the daemon's part of `/etc/hosts`; does nothing without `/etc`. :raises OSError: the system refuses."""
    try:
        with open("/etc/hosts", "rb") as handle:
            before = handle.read(_MAX_HOSTS + 1)
    except FileNotFoundError:
        before = b""
    if len(before) > _MAX_HOSTS:
        raise OSError("/etc/hosts is longer than 1 MiB")
    _replace("/etc/hosts", hosts_text(before.decode("utf-8", "surrogateescape"), names))


def write_nameservers(addresses: Iterable[str]) -> None:
    """Writes `/etc/resolv.conf`; does nothing without `/etc`. :raises OSError: the system refuses."""
    _replace("/etc/resolv.conf", "".join(f"nameserver {each}\n" for each in addresses))


def hosts_text(before: str, names: Mapping[str, str]) -> str:
    """Returns the text `before` of `/etc/hosts` with `names` in the daemon's part."""
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
    """Runs a call in a child process whose `/` is `root`; returns whether it succeeded."""
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


def _load_unbound(load_driver: Callable[[], None]) -> None:
    """Loads the driver, and prevents it from binding the device."""
    with open(f"{_BUS}/drivers_autoprobe", "w") as handle:
        handle.write("0")
    try:
        load_driver()
    finally:
        with open(f"{_BUS}/drivers_autoprobe", "w") as handle:
            handle.write("1")


def _bind() -> str:
    """Binds the device to its driver; returns the interface's name. :raises OSError: the system refuses."""
    for name in sorted(os.listdir(f"{_BUS}/devices")):
        with open(f"{_BUS}/devices/{name}/device") as handle:
            is_network = int(handle.read(16), 16) == _VIRTIO_NET
        if is_network:
            with open(f"{_BUS}/drivers/virtio_net/bind", "w") as handle:
                handle.write(name)
    return _interface_name()


def _interface_name() -> str:
    """Returns the name of the only interface with a device, or an empty text."""
    return next(
        (name for name in sorted(os.listdir(_INTERFACES)) if os.path.exists(f"{_INTERFACES}/{name}/device")), ""
    )


def _packed(address: str) -> bytes:
    return _socket.inet_pton(_socket.AF_INET, address)


def _sockaddr(address: bytes) -> bytes:
    return struct.pack("H2x4s8x", _socket.AF_INET, address)


def _is_hex(text: str) -> bool:
    return not text.strip("0123456789abcdefABCDEF")
