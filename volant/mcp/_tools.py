"""The tools: what a model can ask of Volant, one for each operation.

Each is a struct of arguments, a struct of what it gives, and a function between them that calls what the REST routes
call. The schemas are made from the structs, so that neither can say what the other does not do. What a struct can't
tell, when to use a tool and when another, is in its description, which is written for the model that chooses.
"""

from __future__ import annotations

from volant.model import NetworkView, SnapshotView, VmMemory, VmView

from ._history import EventPage, Events, LogPage, Logs, read_logs, see_events
from ._inside import (
    Action,
    ActionDone,
    Exec,
    ExecDone,
    FileContent,
    ReadFile,
    WriteFile,
    WrittenFile,
    call_action,
    execute,
    read_file,
    write_file,
)
from ._networks import (
    DeletedNetwork,
    ListNetworks,
    MakeNetwork,
    NetworkList,
    WhichNetwork,
    create_network,
    delete_network,
    list_networks,
)
from ._plugins import ListPlugins, PluginList, list_plugins
from ._snapshots import (
    DeletedSnapshot,
    Fork,
    ForkedVms,
    ListSnapshots,
    Restore,
    SnapshotList,
    Take,
    WhichSnapshot,
    delete_snapshot,
    fork_vm,
    list_snapshots,
    restore_vm,
    take_snapshot,
)
from ._tool import Tool
from ._vms import (
    ChangedVm,
    DeletedVm,
    GetVm,
    ListVms,
    MakeVm,
    StartVm,
    StopVm,
    VmPage,
    create_vm,
    delete_vm,
    get_vm,
    list_vms,
    pause_vm,
    restart_vm,
    resume_vm,
    start_vm,
    stop_vm,
    vm_memory,
)

TOOLS: tuple[Tool, ...] = (
    Tool(
        name="vms_list",
        title="List VMs",
        description="List the microVMs on this host with their state, size, plugin and labels, oldest first. Use it to "
        "find a VM's name, or to see what runs; for one VM whose name you know use vms_get.",
        takes=ListVms, gives=VmPage, run=list_vms, read_only=True,
    ),
    Tool(
        name="vms_get",
        title="Look at a VM",
        description="One VM as it is now: its `status` (pending, starting, running, paused, stopping, stopped, "
        "crashed, deleting), its size, and in `reason` why it failed, with the last lines of its console.",
        takes=GetVm, gives=VmView, run=get_vm, read_only=True,
    ),
    Tool(
        name="vms_memory",
        title="Measure the memory of a VM",
        description="How much memory a VM takes now, in MiB: `guest` as its own kernel sees it (null when it does not "
        "answer), `host` what its hypervisor takes of this host. Use it when a VM seems short of memory, or to find "
        "which one takes most.",
        takes=GetVm, gives=VmMemory, run=vm_memory, read_only=True,
    ),
    Tool(
        name="vms_create",
        title="Create a VM",
        description="Make a new Linux microVM and boot it. Answers once it runs and vms_exec works in it, usually in "
        "some seconds. `name` must be new: lower-case letters, digits and dashes. 1 CPU core and 256 MiB do for most; "
        "plugins (plugins_list) bring other software, and may need more. Without a root filesystem its files are in "
        "memory, and are lost when it stops. Give `ttl` (such as `30m`) to a VM that you need only for a while.",
        takes=MakeVm, gives=ChangedVm, run=create_vm,
    ),
    Tool(
        name="vms_start",
        title="Start a VM",
        description="Boot a VM that is stopped or crashed, or let a paused one go on. Does nothing to one that runs.",
        takes=StartVm, gives=ChangedVm, run=start_vm, idempotent=True,
    ),
    Tool(
        name="vms_stop",
        title="Stop a VM",
        description="Shut a VM down and keep it for vms_start. What it has in memory is lost, and with it its files "
        'unless it has a disk (`"disk": "overlay"`). Does nothing to one that is stopped.',
        takes=StopVm, gives=ChangedVm, run=stop_vm, destructive=True, idempotent=True,
    ),
    Tool(
        name="vms_restart",
        title="Restart a VM",
        description="Shut a VM down and boot it again; what is lost is what vms_stop loses. For a VM that hangs, give "
        "`grace_s` 0.",
        takes=StopVm, gives=ChangedVm, run=restart_vm, destructive=True,
    ),
    Tool(
        name="vms_pause",
        title="Pause a VM",
        description="Let a VM stand still, to go on later from the same instant: programs, memory, connections stay, "
        "and it takes no processor time. While it is paused nothing works in it, vms_exec neither. Its memory stays "
        "taken; to free that, use vms_stop.",
        takes=StartVm, gives=ChangedVm, run=pause_vm, idempotent=True,
    ),
    Tool(
        name="vms_resume",
        title="Resume a VM",
        description="Let a paused VM go on; its clock is set. Does nothing to one that runs.",
        takes=StartVm, gives=ChangedVm, run=resume_vm, idempotent=True,
    ),
    Tool(
        name="vms_delete",
        title="Delete a VM",
        description="Destroy a VM with its disk, for good. To get it back later, use vms_stop instead.",
        takes=GetVm, gives=DeletedVm, run=delete_vm, destructive=True, idempotent=True,
    ),
    Tool(
        name="vms_fork",
        title="Copy a running VM",
        description="Make new VMs that go on from where a running or paused VM is now: programs, memory and disk are "
        "the same, name and ids their own; the VM itself goes on. Use it to try several things from one point.",
        takes=Fork, gives=ForkedVms, run=fork_vm,
    ),
    Tool(
        name="vms_snapshot",
        title="Keep a VM as it is now",
        description="Keep a copy of a running or paused VM, memory and disk, on the host, to go back to it with "
        "vms_restore, also after the VM is deleted. Take one before something that may break the VM.",
        takes=Take, gives=SnapshotView, run=take_snapshot,
    ),
    Tool(
        name="vms_restore",
        title="Make a VM from a snapshot",
        description="Make a new VM that goes on from a snapshot (snapshots_list). The VM that the snapshot is of is "
        "not touched; `name` must be new.",
        takes=Restore, gives=ChangedVm, run=restore_vm,
    ),
    Tool(
        name="snapshots_list",
        title="List snapshots",
        description="The copies of VMs that vms_snapshot has kept, the newest first.",
        takes=ListSnapshots, gives=SnapshotList, run=list_snapshots, read_only=True,
    ),
    Tool(
        name="snapshots_delete",
        title="Delete a snapshot",
        description="Destroy a snapshot, for good. VMs that were made from it go on.",
        takes=WhichSnapshot, gives=DeletedSnapshot, run=delete_snapshot, destructive=True, idempotent=True,
    ),
    Tool(
        name="networks_list",
        title="List networks",
        description="The networks in which VMs reach each other by their names, and which VMs are in them with which "
        "addresses.",
        takes=ListNetworks, gives=NetworkList, run=list_networks, read_only=True,
    ),
    Tool(
        name="networks_create",
        title="Make a network",
        description="Make a network in which VMs reach each other by their names; pass its name as `network` to "
        "vms_create. VMs elsewhere do not reach those in it.",
        takes=MakeNetwork, gives=NetworkView, run=create_network,
    ),
    Tool(
        name="networks_delete",
        title="Delete a network",
        description="Remove a network that no VM is in; while one is, delete that first, with vms_delete.",
        takes=WhichNetwork, gives=DeletedNetwork, run=delete_network, destructive=True, idempotent=True,
    ),
    Tool(
        name="vms_exec",
        title="Run a command in a VM",
        description="Run one command in a running VM, wait for its end, and get its exit code and output. Each call "
        "is a process of its own: `cd` and variables do not carry over to the next. Of long output the middle is left "
        "out: write it to a file, and read parts with vms_read_file. To write a file use vms_write_file.",
        takes=Exec, gives=ExecDone, run=execute, destructive=True, open_world=True,
    ),
    Tool(
        name="vms_read_file",
        title="Read a file in a VM",
        description="Read a file in a running VM: text as it is, other bytes as base64. Of a long file you get the "
        "head and the tail; read on in between with `offset`. Directories: vms_exec with `ls`.",
        takes=ReadFile, gives=FileContent, run=read_file, read_only=True,
    ),
    Tool(
        name="vms_write_file",
        title="Write a file in a VM",
        description="Write a whole file in a running VM, in place of what is there; readers see the old or the new "
        "one, never a half. At most some 700 KiB a call.",
        takes=WriteFile, gives=WrittenFile, run=write_file, destructive=True, idempotent=True,
    ),
    Tool(
        name="vms_call_action",
        title="Call an action of a VM",
        description="Ask the workload in a running VM for one of the actions that its plugin offers, such as taking a "
        "screenshot in a browser. plugins_list says which there are and what they take.",
        takes=Action, gives=ActionDone, run=call_action, destructive=True, open_world=True,
    ),
    Tool(
        name="vms_logs",
        title="Read the log of a VM",
        description="What the console (kernel and boot) and the workload of a VM have said, also of one that is "
        "stopped or has crashed. Use it to find out why a VM does not boot or its workload fails. What vms_exec "
        "runs is not in it.",
        takes=Logs, gives=LogPage, run=read_logs, read_only=True,
    ),
    Tool(
        name="vms_events",
        title="See what happened to VMs",
        description="What happened to VMs, in order: created, starting, running, stopped, crashed (and why), deleted. "
        "Without `since` the newest; pass `next` of one call as `since` of the next to miss nothing, with `wait_s` to "
        "wait for something to happen.",
        takes=Events, gives=EventPage, run=see_events, read_only=True,
    ),
    Tool(
        name="plugins_list",
        title="List plugins",
        description="The kinds of VMs that vms_create can make (`plugin`), and the actions that vms_call_action can "
        "call in them.",
        takes=ListPlugins, gives=PluginList, run=list_plugins, read_only=True,
    ),
)  # fmt: skip
"""In the order in which they are shown."""
