"""The interface between hypervisors and the rest of the daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from volant.model import EndKind, ProcessIdentity

AcceleratorName = Literal["kvm", "tcg"]
PAUSED = frozenset({"paused", "postmigrate", "finish-migrate"})
"""Values of `Machine.status` for a paused guest. In `finish-migrate` it is being saved and can't be resumed yet."""
NOT_STARTED = frozenset({"inmigrate", "prelaunch"})
"""Values of `Machine.status` for a machine whose launch is incomplete: it waits for a state, loads one, or waits for
`cont`."""
LaunchCode = Literal[
    "qemu_missing",
    "memory_refused",
    "kvm_unavailable",
    "bad_image",
    "bad_disk",
    "template_refused",
    "exited",
    "no_answer",
]

CheckpointCode = Literal["no_space", "not_permitted", "io_error", "refused", "too_slow", "guest_stopped"]


class HypervisorError(Exception):
    """The hypervisor refuses a command or can't be reached. The text is for people."""


class LaunchFailed(HypervisorError):
    """The launch failed, and its process has ended.

    `code`: `qemu_missing` (not installed or not executable), `memory_refused`, `kvm_unavailable`, `bad_image` (kernel
    or initramfs missing or refused), `bad_disk`, `template_refused`, `exited` (for another reason, see the text),
    `no_answer` (QEMU hung).
    """

    def __init__(self, code: LaunchCode, message: str) -> None:
        super().__init__(message)
        self.code: LaunchCode = code
        self.message = message


class CheckpointFailed(HypervisorError):
    """The checkpoint failed. The guest keeps running, unless `code` is `guest_stopped`.

    `code`: `no_space` (no room for the copy), `not_permitted` (the system prevents the daemon from reading the memory
    of the hypervisor's process), `io_error`, `refused` (the hypervisor can't save the devices, or has ended),
    `too_slow`, `guest_stopped` (the guest could not be resumed yet; this is retried while the machine is attached, and
    by the next attachment).
    """

    def __init__(self, code: CheckpointCode, message: str) -> None:
        super().__init__(message)
        self.code: CheckpointCode = code
        self.message = message


class Disk(msgspec.Struct, frozen=True):
    """A guest's disk: a copy-on-write layer over a read-only file system, or an empty one above an OCI image."""

    base: Path | None
    """A raw image; None for a disk that begins as an empty ext4 file system of `size_mb`."""
    layer: Path
    """Created by `Hypervisor.make_layer`."""
    size_mb: int | None = None
    """The disk's size, at least the base's; None for the base's. The layer never needs more space on the host."""
    image: Path | None = None
    """The read-only disk that the guest mounts below this one in an overlay: a VMDK descriptor that joins the files
    next to it. Set if there is no base."""


class VolumeDisk(msgspec.Struct, frozen=True):
    """A volume of a guest: a raw file, which exists and outlives the machine."""

    path: Path
    serial: str
    """Identifies the disk in the guest. At most 20 characters."""
    read_only: bool = False


class SharedDirectory(msgspec.Struct, frozen=True):
    """A directory of the host that a guest mounts by virtiofs."""

    tag: str
    """Names the device in the guest."""
    socket: Path
    """A Unix socket at which its virtiofsd listens, for one connection. The daemon connects to it, and the hypervisor's
    process inherits the connection."""


class DiskLimits(msgspec.Struct, frozen=True):
    """The limits of all disks of a machine together."""

    iops: int | None = None
    """Operations per second."""
    bytes_per_s: int | None = None


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's network interface and its backend: a tap, a socket or nothing."""

    mac: str
    """The NIC's MAC. The guest of a copy uses its original's until it receives its identity."""
    tap: str | None = None
    """An existing tap of the host, which the daemon opens."""
    socket: Path | None = None
    """A Unix socket at which passt listens. The daemon connects to it; the hypervisor's process does not, and its
    command line does not name it."""
    address: str = ""
    """The guest's address at boot with its prefix length: `192.168.127.2/24`. Empty in a template, whose NIC sends
    nothing. A copy gets its address from its agent."""
    gateway: str = ""
    """The gateway, set if there is an address."""
    nameservers: tuple[str, ...] = ()
    """DNS servers, if there is an address. If empty, the guest's resolv.conf stays as it is."""


class Template(msgspec.Struct, frozen=True):
    """The state from which a machine starts instead of booting: written by `Machine.save` or `Machine.checkpoint` of a
    machine with the same spec."""

    memory: Path
    """The guest's memory. All clones map it privately; it is never written."""
    state: Path
    """The devices' state."""


class MachineKind(msgspec.Struct, frozen=True, kw_only=True):
    """The properties besides its spec that a machine's state depends on; see `Hypervisor.incompatibility`."""

    version: str
    """The hypervisor's version."""
    accelerator: AcceleratorName
    machine: str
    """The hypervisor's name for the machine type."""
    devices: int
    """The format of its devices and their order."""
    tsc_khz: int = 0
    """The rate of the CPU's time stamps, on which its guest relies without a check; 0 if it checks them."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of a machine at one instant, in the directory that `Machine.checkpoint` was given."""

    template: Template
    """The files `memory`, mode 0600, with holes for pages that were never written, and `state`."""
    layer: Path | None
    """`root.qcow2`: a layer over the same image, for `Hypervisor.make_layer(like=…)`. None without a disk."""
    kind: MachineKind
    paused_s: float
    """How long the guest was paused for it; 0 if it was paused already."""
    memory_bytes: int
    """Disk space of `memory`, without holes."""
    state_bytes: int
    layer_bytes: int
    volumes: tuple[str, ...] = ()
    """The names of the copied disks of volumes, in the directory for these."""


HoldChannel = Callable[[], AbstractAsyncContextManager[Callable[[], tuple[int, int]]]]
"""Returns a block in which the host's end of the agent's port is idle: no I/O, no connection, no disconnect. The block
yields a function that returns how many bytes the hypervisor has not read, and how many of its bytes are unread (see
`Channel.hold`)."""


class MachineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One boot of a machine. Adopting a machine needs the same spec as launching it."""

    vm_id: int
    name: str
    """The guest's host name. Empty for templates; their clones receive it later."""
    cpu_cores: int
    memory_mb: int
    kernel: Path
    initramfs: Path
    cmdline: str
    directory: Path
    """The directory of its sockets and its console, mode 0700. `launch` creates it."""
    memory_file: Path
    """The guest's memory, on a file system in RAM, in a directory of mode 0700. Unused with `template`."""
    tag: str
    """The process tag on its command line. It is not secret."""
    accelerator: AcceleratorName
    root: Disk | None = None
    """The disk with the guest's root file system."""
    template: Template | None = None
    """The state to start from. It determines the guest, its host name included."""
    start_paused: bool = False
    """Stop before the guest's first instruction, until `Machine.resume` or, with `template`,
    `Hypervisor.resume_warm`."""
    in_background: bool = False
    """Whether it runs with a lower CPU priority."""
    balloon: bool = False
    """Whether it has the device that shrinks the memory file when the guest frees memory. With `template` it must equal
    the template's, and has no effect."""
    nic: Nic | None = None
    """With `template`, set exactly if the template has one; the backend may differ."""
    volumes: tuple[VolumeDisk, ...] = ()
    directories: tuple[SharedDirectory, ...] = ()
    disk_limits: DiskLimits | None = None
    """Applied by `Machine.limit_disks`. Not on the command line, as a warm process is launched without."""
    vsock_cid: int | None = None
    """The guest's vsock address, if the agent is reached by vhost-vsock instead of the serial port."""

    @property
    def console_path(self) -> Path:
        """The output of the serial console, which the hypervisor appends."""
        return self.directory / "console.log"

    @property
    def console_input_path(self) -> Path:
        """A named pipe for input to the serial console."""
        return self.directory / "console.in"

    @property
    def console_socket_path(self) -> Path:
        """The socket at which the daemon serves the serial console."""
        return self.directory / "console.sock"

    @property
    def control_path(self) -> Path:
        """The socket that controls the hypervisor. One client at a time: the one that is attached."""
        return self.directory / "qmp.sock"

    @property
    def agent_path(self) -> Path:
        """The socket of the agent's virtio-serial port. One client at a time: the channel."""
        return self.directory / "agent.sock"

    @property
    def sandbox_path(self) -> Path:
        """A JSON record of the sandbox, for facts that the kernel does not show. The name is older than the word
        sandbox, and running VMs have it."""
        return self.directory / "sandbox.json"

    @property
    def log_path(self) -> Path:
        """The hypervisor's own output."""
        return self.directory / "qemu.log"


class ParsedMachine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine, according to a running hypervisor's command line."""

    name: str
    """The guest's host name. Empty if it is not on the command line."""
    cpu_cores: int
    memory_mb: int
    accelerator: AcceleratorName
    kernel: Path
    initramfs: Path
    cmdline: str
    """See `MachineSpec.cmdline`."""
    memory_file: Path | None
    """None for a clone."""
    root: Disk | None = None
    template: Path | None = None
    """The directory of the template."""
    balloon: bool = False
    nic: Nic | None = None
    volumes: tuple[VolumeDisk, ...] = ()
    directory_count: int = 0
    """The number of directories of the host. The command line does not contain their paths."""


class AcceleratorChoice(msgspec.Struct, frozen=True):
    """The way in which guests run on this host, and the reason."""

    accelerator: AcceleratorName
    reason: str
    """The reason, in a text for people."""
    version: str | None
    """The hypervisor's version; None if it is not installed."""


class End(msgspec.Struct, frozen=True):
    """The end of a guest or its hypervisor."""

    kind: EndKind
    message: str
    """The reason of the end, in a text for people."""
    exit_status: int | None = None
    """The process's exit status, 0 to 255, or minus the signal number. None if it runs or is not a child."""


class ParkedControl(Protocol):
    """A control connection to a machine that no code is attached to: `Machine.park` creates it, and `Hypervisor.attach`
    takes it."""

    async def aclose(self) -> None:
        """Closes it, unless it was taken."""


class Machine(Protocol):
    """A machine to which the daemon is attached."""

    @property
    def identity(self) -> ProcessIdentity: ...

    async def ended(self) -> End:
        """Waits for the end of the guest or its process. When the guest ends first, its process stays until `quit` or
        `kill`.

        Raises HypervisorError when the process lives but can't be controlled any more.
        """

    async def status(self) -> str:
        """Returns QEMU's status: `running`, `paused`, `shutdown`, … Raises HypervisorError."""

    async def pause(self, timeout_s: float = 30.0) -> None:
        """Pauses the guest until `resume`. Its memory, devices and connections stay. Does nothing if it is paused.

        Raises HypervisorError, also when the guest has ended."""

    async def resume(self, timeout_s: float = 30.0) -> None:
        """Resumes a paused guest, or completes a launch whose daemon was killed. Does nothing if the guest runs.

        Raises HypervisorError."""

    async def connect_network(self) -> bool:
        """Connects to the NIC's backend, in place of an earlier connection, and passes the connection to the
        hypervisor. Returns False if the hypervisor connects by itself, as under earlier versions of the daemon. Raises
        HypervisorError."""

    def watch_disks(self, report: Callable[[str], None]) -> None:
        """Starts calling `report` with a text for people when the host fails to read or write for a disk of the guest,
        which then gets an I/O error. There is at most one call per minute, as a guest can cause errors forever."""

    async def grow_volume(self, serial: str, size_bytes: int) -> None:
        """Lets the guest see the new size of a volume whose file has grown. Raises HypervisorError."""

    async def limit_disks(self) -> None:
        """Applies the limits of the spec, if it has any. Raises HypervisorError."""

    async def save(self, state: Path, timeout_s: float = 30.0) -> None:
        """Stops the guest permanently, flushes its disk and saves its devices to a new file. After the process has
        ended, this file and the memory file are a `Template`. The agent's port must not be connected. Raises
        HypervisorError."""

    async def checkpoint(
        self, into: Path, *, hold: HoldChannel, timeout_s: float = 60.0, volumes: Path | None = None
    ) -> Checkpoint:
        """Copies the machine at one instant into an empty directory, preferably in RAM. A running guest is paused for
        the copy, and resumed even if this fails or is cancelled. Only one call at a time.

        :param hold: entered shortly before the guest is paused, and left when it is resumed
        :param volumes: the directory for copies of the disks of volumes that the guest writes to, with the names of
            their files, preferably on their file system; None for no copies
        :param timeout_s: the deadline of the whole call
        :raises CheckpointFailed: the caller must empty the directory.
        """

    def park(self) -> ParkedControl | None:
        """Keeps the control connection of a paused machine for `resume_warm` and another `attach`. This attachment ends
        before anything is awaited. Returns None if the connection can't be kept."""

    async def quit(self, timeout_s: float = 5.0) -> End:
        """Asks the process to end, and kills it after `timeout_s`. Raises HypervisorError, see `kill`."""

    async def kill(self, timeout_s: float = 10.0) -> End:
        """Kills the process and waits until it has ended. Raises HypervisorError if it has not after `timeout_s`."""


class Hypervisor(Protocol):
    """A kind of hypervisor on this host."""

    @property
    def name(self) -> str: ...

    async def choice(self) -> AcceleratorChoice:
        """Returns how guests run. The first call may take seconds for a probe, whose result is kept. Never fails."""

    async def accelerator(self) -> AcceleratorName:
        """Returns the accelerator of `choice`."""

    async def fingerprint(self) -> str:
        """Returns the properties besides their specs that a template and its clones must share: the hypervisor's
        version, the machine type and the order of devices."""

    def user_of(self, tag: str, vm_id: int) -> int | None:
        """Returns the user for a VM's process, None for the daemon's own. `tag` is any of this daemon's."""

    async def incompatibility(self, kind: MachineKind) -> str | None:
        """Returns why a checkpoint of this kind can't run here, for people, or None. Later versions of the hypervisor
        may be compatible. Templates need an equal `fingerprint` instead."""

    async def make_layer(self, disk: Disk, like: Path | None = None) -> None:
        """Creates the layer of a disk, empty or as a copy of `like`, atomically even if the host loses power. Its
        directory must exist. Replaces the remains of an interrupted call.

        Raises LaunchFailed: `qemu_missing`, `bad_disk`.
        """

    async def launch(self, spec: MachineSpec) -> ProcessIdentity:
        """Starts a machine and returns when its guest runs. If cancelled, it may leave a process with the spec's tag
        and files in its directory.

        Raises LaunchFailed.
        """

    async def resume_warm(self, spec: MachineSpec, control: ParkedControl | None = None) -> None:
        """Connects the NIC of a machine that was launched with `start_paused` and resumes its guest. Its directory may
        have been renamed. No code may be attached. `control` replaces a new connection, and stays parked. Raises
        HypervisorError; the guest may still run."""

    def parse_command_line(self, command_line: Sequence[str]) -> ParsedMachine | None:
        """Returns the machine of a command line that `launch` built, or None for others."""

    def attach(
        self, spec: MachineSpec, identity: ProcessIdentity, control: ParkedControl | None = None
    ) -> AbstractAsyncContextManager[Machine]:
        """Attaches to a launched or adopted machine for the block, which does not end the machine. If the process has
        ended, so has the machine. `control` is its connection, which is closed in any case.

        Raises HypervisorError if the process lives but does not answer.
        """
