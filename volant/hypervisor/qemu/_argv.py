"""The command line: a pure function of the spec.

Every machine is built so that it can be a template or go on from one: its memory is a file, everything has an id, the
machine type is a versioned one (microvm has no versions), and the set of devices does not depend on what a VM happens
to use, but for the disk, which a VM has if its plugin has a root filesystem, the balloon and the NIC. Sockets,
console and log are named relative to the machine's directory, which is QEMU's working directory, so that a long path to
the state never meets the limit of 108 bytes for a socket's name.

- `-action …=pause` and pvpanic: QEMU exits with 0 after poweroff, panic and reboot alike, and an adopted process has no
  exit status. So it stays until somebody has read how its guest ended.
- The console is a file that QEMU appends to, whoever reads it: a socket loses lines while its reader is being
  replaced, and stops the guest while its reader sleeps. Input is a named pipe. A pipe ends for its reader with its last
  writer, for ever as far as QEMU is concerned; so a second chardev, connected to nothing, keeps it open for writing. It
  comes first, as opening a pipe to read waits for a writer.
- A machine that goes on from a template maps the template's memory privately. `readonly` and `rom=off` open the file
  for reading alone: with less, discarding a page would punch a hole into the file, for all that share it.
- A balloon, for what its free page reporting does alone: pages that the guest frees are punched out of the memory file.
  Whatever maps a file together with others must not do that, so what becomes a template has none, and a copy of a
  machine that has one relies on the file being open for reading only.
- No `graphics=off`: it makes the firmware write to the serial console, which is the guest's alone.
- The tag is the guest's `-name`: that is seen on the command line and by QMP, and not by the guest.
"""

from __future__ import annotations

from volant.hypervisor._interface import AcceleratorName, Disk, MachineSpec, Nic
from volant.model.agent import (
    NAMESERVERS_PARAMETER,
    NETWORK_PARAMETER,
    ROOT_PARAMETER,
    ROOT_SERIAL,
    SERIAL_PORT_NAME,
)

PROGRAM = "qemu-system-x86_64"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny"

FORMAT = 2
"""Raised with each change here that gives a guest other devices or another order of them: templates that were made
before don't fit then."""

CMDLINE = "console=ttyS0 quiet panic=-1"
"""The daemon's own part of the kernel's command line. pvpanic stops the machine before `panic=-1` reboots it; where a
kernel panics before it has pvpanic, the reboot is seen instead of a guest that hangs."""

HOSTNAME_PARAMETER = "volant.hostname"
"""The kernel's parameter by which PID 1 is told the guest's name."""

TCG_CODE_MB = 128
"""TCG's cache of translated code: host memory that a guest can fill, 1 GiB by default."""


def build_argv(
    spec: MachineSpec,
    version: tuple[int, int],
    program: str = PROGRAM,
    *,
    machine: str | None = None,
    tap: int = -1,
) -> list[str]:
    """The command line that starts `spec` on QEMU `version`; `machine` is the type that what it goes on from says,
    `tap` the descriptor of its tap that it inherits."""
    argv = [
        *(("nice", "-n", "10") if spec.in_background else ()),
        program,
        *("-name", f"guest={_quote(spec.tag)},debug-threads=on"),
        *("-machine", machine_option(spec.accelerator, version, machine) + ",memory-backend=memory0"),
        *("-accel", "kvm" if spec.accelerator == "kvm" else f"tcg,tb-size={TCG_CODE_MB}"),
        *("-cpu", "host" if spec.accelerator == "kvm" else "max"),
        *("-smp", str(spec.cpu_cores)),
        *("-m", f"{spec.memory_mb}M"),
        *("-object", _memory(spec)),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-sandbox", SANDBOX),
        *("-msg", "timestamp=on"),
        *("-action", "shutdown=pause,reboot=shutdown,panic=pause"),
        *("-chardev", "socket,id=control,path=qmp.sock,server=on,wait=off"),
        *("-mon", "chardev=control,mode=control"),
        *("-chardev", "pipe,id=console-keep,path=console.in"),
        *("-chardev", "file,id=console,path=console.log,append=on,input-path=console.in"),
        *("-serial", "chardev:console"),
        *("-device", f"{_device('pvpanic', spec.accelerator)},id=panic0"),
        *("-object", "rng-random,id=entropy0,filename=/dev/urandom"),
        *("-device", f"{_device('virtio-rng', spec.accelerator)},id=rng0,rng=entropy0"),
        *("-device", f"{_device('virtio-serial', spec.accelerator)},id=serial0,max_ports=8"),
        *("-chardev", "socket,id=agent,path=agent.sock,server=on,wait=off"),
        *("-device", f"virtserialport,id=agent0,bus=serial0.0,nr=1,chardev=agent,name={SERIAL_PORT_NAME}"),
        *("-kernel", str(spec.kernel)),
        *("-initrd", str(spec.initramfs)),
        *("-append", kernel_cmdline(spec)),
    ]
    if spec.root is not None:
        argv += _disk(spec.root, spec.accelerator)
    if spec.vsock_cid is not None:
        argv += ["-device", f"{_device('vhost-vsock', spec.accelerator)},id=vsock0,guest-cid={spec.vsock_cid}"]
    if spec.balloon:
        argv += ["-device", f"{_device('virtio-balloon', spec.accelerator)},id=balloon0,free-page-reporting=on"]
    if spec.nic is not None:
        argv += _nic(spec, spec.nic, version, tap)
    if spec.template is not None:
        argv += ["-incoming", "defer"]
    return argv


def _memory(spec: MachineSpec) -> str:
    path = spec.memory_file if spec.template is None else spec.template.memory
    access = "share=on" if spec.template is None else "share=off,readonly=on,rom=off"
    return f"memory-backend-file,id=memory0,size={spec.memory_mb}M,mem-path={_quote(str(path))},{access}"


def _disk(disk: Disk, accelerator: AcceleratorName) -> list[str]:
    """The whole graph of a disk, node by node.

    What a layer says of its base is not heeded: the cache may have moved, and a guest that gets out of QEMU could have
    written another path there. A full file system of the host is an I/O error in the guest, not a guest that stands
    still without a word.
    """
    return [
        *("-blockdev", f"file,node-name=root-base-file,filename={_quote(str(disk.base))},read-only=on"),
        *("-blockdev", "raw,node-name=root-base,file=root-base-file,read-only=on"),
        *("-blockdev", f"file,node-name=root-layer-file,filename={_quote(str(disk.layer))},discard=unmap"),
        *("-blockdev", "qcow2,node-name=root,file=root-layer-file,backing=root-base,discard=unmap"),
        *(
            "-device",
            f"{_device('virtio-blk', accelerator)},id=root0,drive=root,serial={ROOT_SERIAL},"
            "werror=report,rerror=report",
        ),
    ]


def _nic(spec: MachineSpec, nic: Nic, version: tuple[int, int], tap: int) -> list[str]:
    """The NIC, after all that there may be without it, and what is behind it.

    A tap is opened by the daemon, as QEMU's user has no right to, and is known by its name all the same. A socket is
    connected to by the daemon, too, which plugs the connection into the hub once QEMU runs (`_netdev.py`).

    A copy may have something else behind it than its original, as long as that can do as much. A driver that has
    negotiated nothing yet, as a template's, goes on with anything. What not every Linux can do for a tap is left off,
    so that one that has goes on under another kernel of the host.
    """
    net = "net0"
    if nic.tap is not None:
        net, behind = nic.tap, f"tap,id={nic.tap},fd={tap},vhost=off"
    else:
        behind = "hubport,id=net0,hubid=0"
    # A copy has an address of its own to tell of. And QEMU 10.0 crashes when a driver that knows of announcements
    # resets the NIC of a machine that has gone on without any; Linux does when it powers off.
    without = ["guest_announce=off", "guest_ufo=off", "host_ufo=off"]
    if version >= (8, 1):
        without += ["guest_uso4=off", "guest_uso6=off", "host_uso=off"]
    if spec.accelerator == "tcg":
        without.append("romfile=")
    device = f"{_device('virtio-net', spec.accelerator)},id=nic0,netdev={net},mac={nic.mac}"
    return ["-netdev", behind, "-device", ",".join((device, *without))]


def machine_type(accelerator: AcceleratorName, version: tuple[int, int]) -> str:
    """The type of a machine that boots."""
    return "microvm" if accelerator == "kvm" else f"pc-q35-{version[0]}.{version[1]}"


def machine_option(accelerator: AcceleratorName, version: tuple[int, int], machine: str | None = None) -> str:
    """The machine, of another versioned type where one is given. KVM gets microvm; under TCG that hangs in early boot
    beside other load, as it has no second timer to calibrate by. ACPI is what makes it power off and tell of a panic.
    Its PCI is left off: with it, QEMU 10.0's hangs in early boot under TCG, where alone this machine can be tried
    without KVM."""
    if accelerator == "kvm":
        return "microvm,acpi=on,rtc=on,isa-serial=on,usb=off"
    return f"{machine or machine_type(accelerator, version)},usb=off,vmport=off,smbus=off,i8042=off"


def _device(kind: str, accelerator: AcceleratorName) -> str:
    """The name of a device on the bus that the machine has."""
    if accelerator == "kvm":
        return kind if kind == "pvpanic" else f"{kind}-device"
    return f"{kind}-pci"


def kernel_cmdline(spec: MachineSpec) -> str:
    """The daemon's part, then the VM's own."""
    root = f"{ROOT_PARAMETER}={ROOT_SERIAL}" if spec.root is not None else ""
    hostname = f"{HOSTNAME_PARAMETER}={spec.name}" if spec.name else ""
    nic = spec.nic
    network = nameservers = ""
    if nic is not None and nic.address:
        network = f"{NETWORK_PARAMETER}={nic.address},{nic.gateway},{nic.mac}"
        if nic.nameservers:
            nameservers = f"{NAMESERVERS_PARAMETER}={','.join(nic.nameservers)}"
    parts = (CMDLINE, hostname, root, network, nameservers, spec.cmdline)
    return " ".join(part for part in parts if part)


def _quote(value: str) -> str:
    """QEMU splits options at commas; a doubled one stands for itself."""
    return value.replace(",", ",,")
