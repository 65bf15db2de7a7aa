"""Builds QEMU's command line from a spec, as a pure function.

Every machine can become a template or a clone of one: its memory is a file, everything has an id, and the machine type
is versioned (microvm has no versions). Devices do not depend on what a VM uses, except for three: the disk, which a VM
has if its plugin has a root filesystem, the balloon and the NIC. Paths of sockets, console and log are relative to the
machine's directory, which is QEMU's working directory, as a socket's path has at most 108 bytes.

- `-action …=pause` and pvpanic: QEMU exits with 0 after poweroff, panic and reboot alike, and an adopted process has no
  exit status. So QEMU stays until the daemon has read how its guest ended.
- The console is a file that QEMU appends to: a socket would lose lines while its reader is replaced, and would stop the
  guest while its reader sleeps. Input is a named pipe. QEMU would close the pipe with its last writer, so a second
  chardev, connected to nothing, keeps it open for writing. It comes first, as opening a pipe for reading waits for a
  writer.
- A clone maps the template's memory privately. `readonly` and `rom=off` open the file read-only. Otherwise discarding a
  page would punch a hole into the file, for all clones.
- The balloon is only for its free page reporting: pages that the guest frees are punched out of the memory file. That
  must not happen to a shared file, so a machine that becomes a template has no balloon, and a copy of a machine with
  one relies on the read-only file.
- No `graphics=off`: it makes the firmware write to the serial console, which is only for the guest.
- `hpet=off`: QEMU's HPET wakes its process 250 times a second, also when the guest uses other timers: one percent of a
  CPU for each idle guest. Linux boots with the PIT and the timer of ACPI. (`pit=off` besides: it panics.)
- `psi=0` and `tsc=nowatchdog` stop timers that would wake an idle guest: averages of pressure stalls, and checks of the
  TSC against another clock. Without an HPET the other clock is first the timer interrupt, which a busy host delays, so
  that the kernel would give up a good TSC. Guests still check it where the host's kernel does not trust it.
- `tsc_early_khz`: without it the kernel measures the TSC against the PIT. On a busy host it found 59 and 142 MHz
  instead of 2,596 in two of 320 boots: time ran forty times too fast in such a guest, and in all copies of it.
- `no_timer_check`: the kernel checks as it boots that its timer ticks, and panics if it does not ("IO-APIC + timer
  doesn't work"). QEMU's main thread makes these ticks, and on a busy host they came too late in one of thousands of
  boots. Under KVM the kernel skips the check automatically.
- `noreplace-smp`: a kernel with one processor rewrites thousands of its own instructions as it boots, which costs an
  emulator a tenth of a whole boot. An emulator does not benefit from the result.
- The tag is the guest's `-name`, which is visible on the command line and in QMP, but not to the guest.
"""

from __future__ import annotations

from collections.abc import Sequence

from volant.hypervisor._interface import AcceleratorName, Disk, MachineSpec, Nic
from volant.model.agent import (
    IMAGE_PARAMETER,
    IMAGE_SERIAL,
    NAMESERVERS_PARAMETER,
    NETWORK_PARAMETER,
    ROOT_PARAMETER,
    ROOT_SERIAL,
    SERIAL_PORT_NAME,
)

from ._volume_disks import directory_argv, volume_argv

PROGRAM = "qemu-system-x86_64"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny"

FORMAT = 3
"""The format of the devices. Raise it with each change of a guest's devices or their order, so that earlier templates
don't fit any more."""
WITH_HPET = 2
"""The previous format, whose machines have an HPET. They still run, and are loaded from snapshots."""

CMDLINE = "console=ttyS0 quiet panic=-1 psi=0 no_timer_check noreplace-smp"
"""The daemon's part of the kernel's command line. pvpanic stops the machine before `panic=-1` reboots it. A kernel that
panics before its pvpanic driver is loaded reboots, instead of hanging."""

TRUST_TSC = "tsc=nowatchdog"
"""Added on hosts that trust their TSC themselves, followed by the TSC's rate in kHz."""
TSC_RATE = "tsc_early_khz="

HOSTNAME_PARAMETER = "volant.hostname"
"""The kernel parameter with the guest's host name, for PID 1."""

_EMPTY_NODE = '{"driver":"qcow2","node-name":"root","file":"root-layer-file","backing":null,"discard":"unmap"}'
"""The layer of a disk without a base. Only JSON can express that, and it also overrides a base that a guest which
controls QEMU could have written into the layer."""

TCG_CODE_MB = 128
"""The limit of TCG's cache of translated code, which a guest can fill. QEMU's default is 1 GiB."""


def build_argv(
    spec: MachineSpec,
    version: tuple[int, int],
    program: str = PROGRAM,
    *,
    machine: str | None = None,
    devices: int = FORMAT,
    tsc_khz: int = 0,
    tap: int = -1,
    connections: Sequence[int] = (),
) -> list[str]:
    """Returns the command line that starts `spec` on QEMU `version`.

    :param machine: the machine type of the template or checkpoint that it starts from
    :param devices: the format of its devices, likewise
    :param tsc_khz: the rate of the host's TSC, if the host's kernel trusts it; otherwise 0
    :param tap: the inherited descriptor of its tap
    :param connections: the inherited descriptors of the connections to its directories' virtiofsd
    """
    argv = [
        *(("nice", "-n", "10") if spec.in_background else ()),
        program,
        *("-name", f"guest={_quote(spec.tag)},debug-threads=on"),
        *("-machine", machine_option(spec.accelerator, version, machine, devices) + ",memory-backend=memory0"),
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
        *("-append", kernel_cmdline(spec, tsc_khz=tsc_khz if devices != WITH_HPET else 0)),
    ]
    if spec.root is not None:
        argv += _disk(spec.root, spec.accelerator)
    if spec.vsock_cid is not None:
        argv += ["-device", f"{_device('vhost-vsock', spec.accelerator)},id=vsock0,guest-cid={spec.vsock_cid}"]
    if spec.balloon:
        argv += ["-device", f"{_device('virtio-balloon', spec.accelerator)},id=balloon0,free-page-reporting=on"]
    if spec.nic is not None:
        argv += _nic(spec, spec.nic, version, tap)
    argv += volume_argv(spec.volumes, _device("virtio-blk", spec.accelerator))
    argv += directory_argv(spec.directories, connections, _device("vhost-user-fs", spec.accelerator))
    if spec.template is not None:
        argv += ["-incoming", "defer"]
    if spec.template is not None or spec.start_paused:
        # Without -S QEMU would also let a guest go on as soon as its state is loaded, as that says that it ran.
        argv += ["-S"]
    return argv


def _memory(spec: MachineSpec) -> str:
    path = spec.memory_file if spec.template is None else spec.template.memory
    access = "share=on" if spec.template is None else "share=off,readonly=on,rom=off"
    return f"memory-backend-file,id=memory0,size={spec.memory_mb}M,mem-path={_quote(str(path))},{access}"


def _disk(disk: Disk, accelerator: AcceleratorName) -> list[str]:
    """Returns the complete graph of block nodes.

    It overrides the base's path in the layer, as the cache may have moved, and a guest that controls QEMU could have
    written another path. A full file system of the host is an I/O error in the guest, instead of pausing it silently.
    """
    argv, node = [], _EMPTY_NODE
    if disk.base is not None:
        node = "qcow2,node-name=root,file=root-layer-file,backing=root-base,discard=unmap"
        argv += [
            *("-blockdev", f"file,node-name=root-base-file,filename={_quote(str(disk.base))},read-only=on"),
            *("-blockdev", "raw,node-name=root-base,file=root-base-file,read-only=on"),
        ]
    argv += [
        *("-blockdev", f"file,node-name=root-layer-file,filename={_quote(str(disk.layer))},discard=unmap"),
        *("-blockdev", node),
        *("-device", _block_device("root", ROOT_SERIAL, accelerator)),
    ]
    if disk.image is not None:
        argv += [
            *("-blockdev", f"file,node-name=image-file,filename={_quote(str(disk.image))},read-only=on"),
            *("-blockdev", "vmdk,node-name=image,file=image-file,read-only=on"),
            *("-device", _block_device("image", IMAGE_SERIAL, accelerator)),
        ]
    return argv


def _block_device(node: str, serial: str, accelerator: AcceleratorName) -> str:
    return f"{_device('virtio-blk', accelerator)},id={node}0,drive={node},serial={serial},werror=report,rerror=report"


def _nic(spec: MachineSpec, nic: Nic, version: tuple[int, int], tap: int) -> list[str]:
    """Returns the NIC and its backend. They come last, so that they change no other device's place.

    The daemon opens the tap, as QEMU's user may not. The tap's name still identifies it. The daemon also connects to
    passt's socket, and plugs the connection into the hub once QEMU runs (`_netdev.py`).

    A copy may have another backend than its original if that has the same features. A driver that has negotiated
    nothing yet, as in a template, works with any. Features that some kernels lack for taps are off, so that copies also
    run under another kernel.
    """
    net = "net0"
    if nic.tap is not None:
        net, behind = nic.tap, f"tap,id={nic.tap},fd={tap},vhost=off"
    else:
        behind = "hubport,id=net0,hubid=0"
    # A copy must not announce its original's address. And QEMU 10.0 crashes when a driver with the announce feature
    # resets the NIC of a copy that made no announcement, as Linux does when it powers off.
    without = ["guest_announce=off", "guest_ufo=off", "host_ufo=off"]
    if version >= (8, 1):
        without += ["guest_uso4=off", "guest_uso6=off", "host_uso=off"]
    if spec.accelerator == "tcg":
        without.append("romfile=")
    device = f"{_device('virtio-net', spec.accelerator)},id=nic0,netdev={net},mac={nic.mac}"
    return ["-netdev", behind, "-device", ",".join((device, *without))]


def machine_type(accelerator: AcceleratorName, version: tuple[int, int]) -> str:
    """Returns the type of new machines."""
    return "microvm" if accelerator == "kvm" else f"pc-q35-{version[0]}.{version[1]}"


def machine_option(
    accelerator: AcceleratorName, version: tuple[int, int], machine: str | None = None, devices: int = FORMAT
) -> str:
    """Returns the value of `-machine`. `machine` and `devices` override the type and the format of new machines.

    KVM uses microvm. Under TCG microvm hangs in early boot on a busy host, as it has no second timer for calibration.
    It needs ACPI to power off and to report panics. Its PCI is off: with PCI, QEMU 10.0's microvm hangs in early boot
    under TCG, which is the only way to test it without KVM.
    """
    if accelerator == "kvm":
        return "microvm,acpi=on,rtc=on,isa-serial=on,usb=off"
    hpet = "" if devices == WITH_HPET else ",hpet=off"
    return f"{machine or machine_type(accelerator, version)},usb=off,vmport=off,smbus=off,i8042=off{hpet}"


def tsc_khz_of(argv: Sequence[str]) -> int:
    """Returns the TSC rate that the guest of a running machine relies on; 0 if it checks its TSC."""
    words = argv[argv.index("-append") + 1].split()
    rates = [word.removeprefix(TSC_RATE) for word in words if word.startswith(TSC_RATE)]
    return int(rates[0]) if TRUST_TSC in words and rates else 0


def format_of(argv: Sequence[str]) -> int:
    """Returns the format of the devices of a running machine, which an earlier version may have started."""
    machine = argv[argv.index("-machine") + 1].split(",")
    return FORMAT if machine[0] == "microvm" or "hpet=off" in machine else WITH_HPET


def _device(kind: str, accelerator: AcceleratorName) -> str:
    """Returns a device's name for the machine's bus."""
    if accelerator == "kvm":
        return kind if kind == "pvpanic" else f"{kind}-device"
    return f"{kind}-pci"


def kernel_cmdline(spec: MachineSpec, *, tsc_khz: int = 0) -> str:
    """Returns the kernel's command line: the daemon's part, then the VM's."""
    # Under KVM, guests have a clock of its own.
    tsc = f"{TRUST_TSC} {TSC_RATE}{tsc_khz}" if tsc_khz and spec.accelerator == "tcg" else ""
    root = f"{ROOT_PARAMETER}={ROOT_SERIAL}" if spec.root is not None else ""
    image = f"{IMAGE_PARAMETER}={IMAGE_SERIAL}" if spec.root is not None and spec.root.image is not None else ""
    hostname = f"{HOSTNAME_PARAMETER}={spec.name}" if spec.name else ""
    nic = spec.nic
    network = nameservers = ""
    if nic is not None and nic.address:
        network = f"{NETWORK_PARAMETER}={nic.address},{nic.gateway},{nic.mac}"
        if nic.nameservers:
            nameservers = f"{NAMESERVERS_PARAMETER}={','.join(nic.nameservers)}"
    parts = (CMDLINE, tsc, hostname, root, image, network, nameservers, spec.cmdline)
    return " ".join(part for part in parts if part)


def _quote(value: str) -> str:
    """Escapes commas, at which QEMU splits options."""
    return value.replace(",", ",,")
