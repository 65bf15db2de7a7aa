"""What a hypervisor is to the rest of the daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from volant.model import EndKind, ProcessIdentity

AcceleratorName = Literal["kvm", "tcg"]
STANDS_STILL = frozenset({"paused", "postmigrate", "finish-migrate"})
"""What `Machine.status` says of a guest that was stopped, and can go on. The last one can't yet: it is being saved."""
NOT_YET_RUN = frozenset({"inmigrate", "prelaunch"})
"""What `Machine.status` says of a machine whose launch is not over: it waits for a state or loads one, or has nothing
left to wait for but `cont`."""
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
    """The hypervisor does not do what it is told, or cannot be told. The text is for people."""


class LaunchFailed(HypervisorError):
    """No machine came to be; nothing of the attempt runs any more.

    `code`: `qemu_missing` (not installed, or not to be executed), `memory_refused`, `kvm_unavailable`, `bad_image`
    (kernel or initramfs missing or not to be loaded), `bad_disk` (likewise the disk), `template_refused` (likewise the
    template that it was to go on from), `exited` (for another reason, see the text), `no_answer` (it hung).
    """

    def __init__(self, code: LaunchCode, message: str) -> None:
        super().__init__(message)
        self.code: LaunchCode = code
        self.message = message


class CheckpointFailed(HypervisorError):
    """There is no checkpoint. The guest goes on as if nothing had been asked, unless `code` is `guest_stopped`.

    `code`: `no_space` (where the copy goes is full), `not_permitted` (the system keeps the daemon from reading the
    memory of the hypervisor's process), `io_error`, `refused` (the hypervisor can't save the devices, or is gone),
    `too_slow`, `guest_stopped` (it could not be let go on yet; that is tried again for as long as the machine is
    attached, and by who attaches next).
    """

    def __init__(self, code: CheckpointCode, message: str) -> None:
        super().__init__(message)
        self.code: CheckpointCode = code
        self.message = message


class Disk(msgspec.Struct, frozen=True):
    """A guest's disk: a copy-on-write layer over an image that is never written to."""

    base: Path
    """Raw."""
    layer: Path
    """As `Hypervisor.make_layer` made it."""
    size_mb: int | None = None
    """How large it is when it is made, the image at least; None: as large as that. It never takes more of the host."""


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's network interface, and what is behind it: a tap, a socket, or nothing at all."""

    mac: str
    """As the NIC has it. The guest of a copy keeps its original's until it is told who it is."""
    tap: str | None = None
    """A network interface of the host's that is there already, and that the hypervisor's user may open."""
    socket: Path | None = None
    """A Unix socket at which a process listens that speaks for the guest on the host's network (passt). The daemon
    connects to it; the hypervisor's process does not, and its command line does not name it."""
    address: str = ""
    """What the guest takes in its boot, with the prefix: `192.168.127.2/24`. Empty, as in a template: none, and the
    NIC stays silent. A copy is told by its agent."""
    gateway: str = ""
    """With an address."""
    nameservers: tuple[str, ...] = ()
    """With an address, whom the guest asks for names. Empty: its files are left as they are."""


class Template(msgspec.Struct, frozen=True):
    """Where a machine goes on from, instead of booting: what `Machine.save` or `Machine.checkpoint` left of one with
    the same spec."""

    memory: Path
    """The guest's memory. Mapped privately: never written to, and shared by all that go on from it."""
    state: Path
    """The devices' state."""


class MachineKind(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine is of, beside its spec, as far as it matters to where a copy of it goes on."""

    version: str
    """The hypervisor's, whose process it is."""
    accelerator: AcceleratorName
    machine: str
    """The hypervisor's name for the kind of machine."""
    devices: int
    """The form that its devices and their order have."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of a machine at one instant, in the directory that `Machine.checkpoint` was given."""

    template: Template
    """Its files `memory`, mode 0600, in which what no guest has ever written is a hole, and `state`."""
    layer: Path | None
    """`root.qcow2`: a layer over the same image, for `Hypervisor.make_layer(like=…)`. None: the machine has no disk."""
    kind: MachineKind
    paused_s: float
    """How long the guest stood still; 0 where it did already."""
    memory_bytes: int
    """Room that the memory takes, holes not counted."""
    state_bytes: int
    layer_bytes: int


HoldChannel = Callable[[], AbstractAsyncContextManager[Callable[[], tuple[int, int]]]]
"""Makes the block in which nobody reads or writes at the host's end of the agent's port, or connects or leaves there;
what it gives tells how many bytes the hypervisor has not read yet, and how many nobody has read that it has sent (see
`Channel.hold`)."""


class MachineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One boot of a machine. Whoever adopts it gives the same one as who launched it."""

    vm_id: int
    name: str
    """The guest's host name. Empty: it is told later, as nothing of a template may name a VM."""
    cpu_cores: int
    memory_mb: int
    kernel: Path
    initramfs: Path
    cmdline: str
    directory: Path
    """Its sockets and its console. Made here, mode 0700."""
    memory_file: Path
    """The guest's memory, on a file system in RAM, in a directory of mode 0700. With `template` there is none."""
    tag: str
    """What its process is known by; no secret."""
    accelerator: AcceleratorName
    root: Disk | None = None
    """The disk with the guest's root filesystem."""
    template: Template | None = None
    """Go on from there; the guest then is whatever that was, its host name among it."""
    waits: bool = False
    """With `template`: stop before the guest's first instruction, until `Hypervisor.go_on`."""
    in_background: bool = False
    """Whether everything else on the host comes first."""
    balloon: bool = False
    """Whether it has the device by which the memory file shrinks as the guest frees memory. With `template` it is what
    that machine had, and nothing comes back."""
    nic: Nic | None = None
    """With `template` there is one exactly if that machine had one; what is behind it may be another thing."""
    vsock_cid: int | None = None
    """The guest's vsock address, where the host has vhost-vsock: then the agent is reached by it instead of the
    serial port."""

    @property
    def console_path(self) -> Path:
        """What the serial console has said, appended by the hypervisor."""
        return self.directory / "console.log"

    @property
    def console_input_path(self) -> Path:
        """A named pipe: what is written to it is typed on the serial console."""
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
        """What stands between its process and the host, as JSON, where the kernel does not say it."""
        return self.directory / "walls.json"

    @property
    def log_path(self) -> Path:
        """What the hypervisor itself has to say."""
        return self.directory / "qemu.log"


class FoundMachine(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line of a running hypervisor tells of its machine."""

    name: str
    """As its guest was told. Empty: not on its command line."""
    cpu_cores: int
    memory_mb: int
    accelerator: AcceleratorName
    kernel: Path
    initramfs: Path
    cmdline: str
    """As `MachineSpec.cmdline`."""
    memory_file: Path | None
    """None: it goes on from a template."""
    root: Disk | None = None
    template: Path | None = None
    """The directory of that."""
    balloon: bool = False
    nic: Nic | None = None


class AcceleratorChoice(msgspec.Struct, frozen=True):
    """How guests run on this host, and why so."""

    accelerator: AcceleratorName
    reason: str
    """For people."""
    version: str | None
    """The hypervisor's; None: there is none."""


class End(msgspec.Struct, frozen=True):
    """How a guest, or its hypervisor under it, ended."""

    kind: EndKind
    message: str
    """For people."""
    exit_status: int | None = None
    """Of the process, when it has ended and was our child: 0 to 255, or minus the signal number."""


class Machine(Protocol):
    """A machine under watch."""

    @property
    def identity(self) -> ProcessIdentity: ...

    async def ended(self) -> End:
        """Wait for the end of the guest or of its process, whichever is first; at once when it has been. The process of
        a guest that has ended stays until `quit` or `kill`.

        Raises HypervisorError when the process lives but cannot be talked to any more.
        """

    async def status(self) -> str:
        """QEMU's word for what it does: `running`, `paused`, `shutdown`, … Raises HypervisorError."""

    async def powerdown(self) -> None:
        """Press the power button; the guest may ignore it. Raises HypervisorError."""

    async def pause(self, timeout_s: float = 30.0) -> None:
        """Let the guest stand still until `resume`; one that does already is left so. Its memory and its devices stay,
        and whoever is connected to them. Raises HypervisorError, also where the guest has ended."""

    async def resume(self, timeout_s: float = 30.0) -> None:
        """Let a guest that is paused go on, and finish a launch whose daemon was killed, however far it had come.
        Another guest is left alone. Raises HypervisorError."""

    async def connect_network(self) -> bool:
        """Connects to what is behind the network interface of the machine's spec, in place of an earlier connection,
        and passes the connection to the hypervisor. Returns False where the hypervisor connects by itself instead, as
        those that earlier versions of the daemon started. Raises HypervisorError."""

    async def save(self, state: Path, timeout_s: float = 30.0) -> None:
        """Stop the guest for good, bring what it has written to its disk there, and save the devices to a new file.
        With the memory file that is a `Template`, once the process has ended. Nobody may be connected to the agent.
        Raises HypervisorError."""

    async def checkpoint(self, into: Path, *, hold: HoldChannel, timeout_s: float = 60.0) -> Checkpoint:
        """Copy the machine as it is at one instant into an empty directory, best in RAM, and let its guest go on. One
        that stands still is copied too, and still does afterwards. `hold` is entered for the time in which the guest
        stands still and a little before. Whatever happens, also when this is cancelled, the guest goes on, and what
        is in the directory then is the caller's to remove. One checkpoint of a machine at a time.

        `timeout_s` is for all of it. Raises CheckpointFailed."""

    async def quit(self, timeout_s: float = 5.0) -> End:
        """Ask the process to end, and kill it when it has not after `timeout_s`. Raises HypervisorError, as `kill`."""

    async def kill(self, timeout_s: float = 10.0) -> End:
        """Kill the process and wait until it is gone. Raises HypervisorError when it is not after `timeout_s`."""


class Hypervisor(Protocol):
    """A kind of hypervisor on this host."""

    @property
    def name(self) -> str: ...

    async def choice(self) -> AcceleratorChoice:
        """How guests would run. The first call may take seconds, as it tries; its outcome is kept. Never fails."""

    async def accelerator(self) -> AcceleratorName:
        """What `choice` says of it."""

    async def fingerprint(self) -> str:
        """What a machine must have in common with a template that it goes on from, beside its spec: the hypervisor's
        version, the kind of machine, the order of its devices."""

    def user_of(self, tag: str, vm_id: int) -> int | None:
        """The user that the process of a VM runs as, if this daemon starts it for that; None: its own. `tag` is one of
        this daemon's."""

    async def misfit(self, kind: MachineKind) -> str | None:
        """Why a machine that was copied as `kind` can't go on here, for people; None: it can, also under a later
        version than it was copied under. A template is made anew instead; see `fingerprint`."""

    async def make_layer(self, disk: Disk, like: Path | None = None) -> None:
        """Make the layer of a disk, empty or `like` another one over the same base; all or nothing, also over a power
        cut. Its directory must be there. What a call that was cancelled or killed has left is replaced, or goes with
        the directory.

        Raises LaunchFailed: `qemu_missing`, `bad_disk`.
        """

    async def launch(self, spec: MachineSpec) -> ProcessIdentity:
        """Start a machine. When this returns, its guest runs. Cancelled half-way, it may leave a process with the
        spec's tag, and files in its directory.

        Raises LaunchFailed.
        """

    async def go_on(self, spec: MachineSpec) -> None:
        """Let the guest of a machine run that waits; one that runs does so already. Its directory may have another name
        than when it was launched, and its NIC has what is behind it only now. Nobody may be attached. Raises
        HypervisorError; the guest may run all the same."""

    def recognise(self, command_line: Sequence[str]) -> FoundMachine | None:
        """The machine of a command line that `launch` once made; None where it is another one."""

    def attach(self, spec: MachineSpec, identity: ProcessIdentity) -> AbstractAsyncContextManager[Machine]:
        """Watch and control a machine, just launched or adopted. A process that is gone already gives a machine that
        has ended. Leaving the block does nothing to the machine.

        Raises HypervisorError when the process lives but does not answer.
        """
