"""The tools: what a model can do with Volant, one for each operation.

Most are derived from the operations. Those here do what one request of REST does not: they read or write a whole
stream, cut what is too long for a model, or filter.
"""

from __future__ import annotations

from volant.operations import Table

from ._derived import derived_tools
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
from ._lists import (
    ListNetworks,
    ListPlugins,
    ListSnapshots,
    NetworkList,
    PluginList,
    SnapshotList,
    list_networks,
    list_plugins,
    list_snapshots,
)
from ._tool import Tool


def tools(table: Table) -> tuple[Tool, ...]:
    """Returns the tools of a table, in the order in which they are shown."""
    return (*derived_tools(table), *_BY_HAND)


_BY_HAND = (
    Tool(
        name="snapshots_list",
        operation="list_snapshots",
        title="List snapshots",
        description="The copies of VMs that vms_snapshot has kept, the newest first.",
        takes=ListSnapshots, gives=SnapshotList, run=list_snapshots, read_only=True,
    ),
    Tool(
        name="networks_list",
        operation="list_networks",
        title="List networks",
        description="The networks in which VMs reach each other by their names, and which VMs are in them with which "
        "addresses.",
        takes=ListNetworks, gives=NetworkList, run=list_networks, read_only=True,
    ),
    Tool(
        name="vms_exec",
        operation="agent_exec",
        title="Run a command in a VM",
        description="Run one command in a running VM, wait for its end, and get its exit code and output. Each call "
        "is a process of its own: `cd` and variables do not carry over to the next. Of long output the middle is left "
        "out: write it to a file, and read parts with vms_read_file. To write a file use vms_write_file.",
        takes=Exec, gives=ExecDone, run=execute, destructive=True, open_world=True,
    ),
    Tool(
        name="vms_read_file",
        operation="read_file",
        title="Read a file in a VM",
        description="Read a file in a running VM: text as it is, other bytes as base64. Of a long file you get the "
        "head and the tail; read on in between with `offset`. Directories: vms_exec with `ls`.",
        takes=ReadFile, gives=FileContent, run=read_file, read_only=True,
    ),
    Tool(
        name="vms_write_file",
        operation="write_file",
        title="Write a file in a VM",
        description="Write a whole file in a running VM, in place of what is there; readers see the old or the new "
        "one, never a half. At most some 700 KiB a call.",
        takes=WriteFile, gives=WrittenFile, run=write_file, destructive=True, idempotent=True,
    ),
    Tool(
        name="vms_call_action",
        operation="call_action",
        title="Call an action of a VM",
        description="Ask the workload in a running VM for one of the actions that its plugin offers, such as taking a "
        "screenshot in a browser. plugins_list says which there are and what they take.",
        takes=Action, gives=ActionDone, run=call_action, destructive=True, open_world=True,
    ),
    Tool(
        name="vms_logs",
        operation="vm_logs",
        title="Read the log of a VM",
        description="What the console (kernel and boot) and the workload of a VM have said, also of one that is "
        "stopped or has crashed. Use it to find out why a VM does not boot or its workload fails. What vms_exec "
        "runs is not in it.",
        takes=Logs, gives=LogPage, run=read_logs, read_only=True,
    ),
    Tool(
        name="vms_events",
        operation="vm_events",
        title="See what happened to VMs",
        description="What happened to VMs, in order: created, starting, running, stopped, crashed (and why), deleted. "
        "Without `since` the newest; pass `next` of one call as `since` of the next to miss nothing, with `wait_s` to "
        "wait for something to happen.",
        takes=Events, gives=EventPage, run=see_events, read_only=True,
    ),
    Tool(
        name="plugins_list",
        operation="list_plugins",
        title="List plugins",
        description="The kinds of VMs that vms_create can make (`plugin`), and the actions that vms_call_action can "
        "call in them.",
        takes=ListPlugins, gives=PluginList, run=list_plugins, read_only=True,
    ),
)  # fmt: skip
