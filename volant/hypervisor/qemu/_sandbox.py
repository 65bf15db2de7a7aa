"""Prepares the sandbox of a QEMU process: its user, and access to its files. See `docs/explanation/sandbox.md`.

Each launch grants the rights that its spec needs, only to its user. So no rights must be remembered or revoked.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from volant.host import Grant, Host, Sandbox, number_of, numbered, users_without_vm
from volant.hypervisor._interface import MachineSpec
from volant.model import ProcessIdentity

_READ, _READ_WRITE = 4, 6
_KVM, _VSOCK = Path("/dev/kvm"), Path("/dev/vhost-vsock")
_SAVED = "saved.state"
_PARTS = (".vmdk", ".erofs")
"""The files of an OCI image's disk, all in one directory."""


class SandboxPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The layers of the sandbox on this host."""

    places: tuple[Path, ...]
    """The daemon's directories."""
    landlock: int
    """Landlock's version; 0 without Landlock."""
    no_connect: bool
    """Whether a seccomp filter denies `connect`."""
    users: range | None
    """User and group ids for hypervisors; None if they run as the daemon's user."""
    no_users: str | None = None
    """Why there are no such users."""
    private: tuple[Path, ...] = ()
    """The directories of files that only hypervisors which boot from them may read."""

    def view(self) -> dict[str, object]:
        """Returns the layers for people, ready for JSON."""
        users = None if self.users is None else f"{self.users.start}-{self.users.stop - 1}"
        return {
            "users": users,
            "no_users": self.no_users,
            "landlock": self.landlock,
            "no_connect": self.no_connect,
        }


class QemuSandbox:
    """Prepares the sandboxes of one daemon's hypervisors."""

    def __init__(self, host: Host, plan: SandboxPlan) -> None:
        self._host = host
        self.plan = plan
        self._last_user = 0

    async def prepare(self, spec: MachineSpec) -> Sandbox:
        """Grants a machine's process its files and returns its sandbox. The directory and the files must exist.

        :raises OSError: a file can't be granted.
        """
        host, plan, template = self._host, self.plan, spec.template
        user, no_user, groups = await self._user(spec), plan.no_users, set()
        for device in _devices(spec):
            try:
                groups.add(host.sandbox.group_of(device))
            except PermissionError as error:
                user, no_user = None, str(error)
        reads = [spec.kernel, spec.initramfs]
        writes = []
        if template is None:
            writes.append(spec.memory_file)
        else:
            reads += [template.memory, template.state]
        if spec.root is not None:
            writes.append(spec.root.layer)
            if spec.root.base is not None:
                reads.append(spec.root.base)
            if spec.root.image is not None:
                directory = spec.root.image.parent
                reads += [directory / name for name in host.files.names(directory) if name.endswith(_PARTS)]
        # To this user alone. A reader that runs has the file open, and needs no access any more.
        only_reads = [volume.path for volume in spec.volumes if volume.read_only]
        writes += [volume.path for volume in spec.volumes if not volume.read_only]
        shared = {}
        if plan.users is not None:
            if template is not None:
                group = group_of(plan.users, template.memory.parent)
                shared = dict.fromkeys((template.memory, template.state), group)
            for path in reads:
                if any(path.is_relative_to(directory) for directory in plan.private):
                    # It never changes, and may have several names.
                    shared[path] = numbered(plan.users, host.files.fingerprint(path))
        groups |= set(shared.values())
        if user is not None:
            grants = [Grant(path, "user", user, _READ_WRITE) for path in writes]
            grants += [Grant(path, "user", user, _READ_WRITE) for path in (spec.console_path, spec.console_input_path)]
            grants += [Grant(path, "user", user, _READ) for path in only_reads]
            for path in reads:
                if path in shared:
                    grants.append(Grant(path, "group", shared[path], _READ))
                elif any(path.is_relative_to(place) for place in plan.places):
                    grants.append(Grant(path, "others", 0, _READ))
            await host.sandbox.lend_directory(spec.directory, user, grants, plan.places)
        sandbox = Sandbox(
            user=user,
            groups=tuple(sorted(each for each in groups if each is not None)),
            landlock=plan.landlock > 0,
            read=(*reads, *only_reads),
            write=(*writes, *_devices(spec)),
            no_connect=plan.no_connect,
            no_reservation=True,
        )
        record = {"user": user, "landlock": plan.landlock, "no_connect": sandbox.no_connect, "no_user": no_user}
        # The hypervisor's user may have created a file of this name. It is not synced, as it is useless after a reboot.
        host.files.unlink(spec.sandbox_path)
        fd = host.descriptors.open(spec.sandbox_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            host.descriptors.write(fd, msgspec.json.encode(record))
        finally:
            host.descriptors.close(fd)
        return sandbox

    async def _user(self, spec: MachineSpec) -> int | None:
        users = self.plan.users
        if users is None:
            return None
        if spec.vm_id:
            return user_of(users, spec.tag, spec.vm_id)
        # The process has no VM yet, so it gets a user that no process has.
        # Reading all processes is slow, but few such processes are started and nobody waits for them.
        rest = users_without_vm(users)
        taken = await self._host.proc.users()
        for _ in rest:
            # Start after the last one, so that processes started at the same time get different users.
            self._last_user = (self._last_user + 1) % len(rest)
            if rest[self._last_user] not in taken:
                return rest[self._last_user]
        raise OSError(f"all of {len(rest)} users for hypervisors without a VM have processes")


def user_of(users: range, tag: str, vm_id: int) -> int:
    """Returns the user of a VM's process. `tag` is its own, or another one of the same daemon."""
    half = max(1, len(users) // 2)
    return users[(number_of(tag.rpartition("-")[0]) + vm_id) % half]


def group_of(users: range, source: Path) -> int:
    """Returns the group that may read a template or a checkpoint."""
    return numbered(users, source.name)


def _devices(spec: MachineSpec) -> tuple[Path, ...]:
    found = [_KVM] if spec.accelerator == "kvm" else []
    if spec.vsock_cid is not None:
        found.append(_VSOCK)
    return tuple(found)


async def make_state_file(host: Host, spec: MachineSpec, identity: ProcessIdentity) -> Path:
    """Creates an empty file in the machine's directory that its process can write. The caller removes it. Raises
    OSError, ProcessGone."""
    path = spec.directory / _SAVED
    await host.disk.allocate(path, 0, reserve=False)
    user = host.proc.status(identity).user
    if user != os.geteuid():
        await host.sandbox.grant([Grant(path, "user", user, _READ_WRITE)], ())
    return path
