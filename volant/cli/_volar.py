"""`volar`: its groups of commands, loaded when they are used, as their imports take longer than most commands."""

from __future__ import annotations

from collections.abc import Sequence

import click

from volant import __version__

from ._lazy_group import Lazy, LazyGroup
from ._options import common

_SECTIONS = {
    "Use VMs": {
        "run": Lazy("_run_vm:run", "Run a program of an OCI image in a new VM. Put options before IMAGE."),
        "exec": Lazy("_exec:exec_", "Run a command in a VM; put options before NAME. Use -it for a shell."),
        "ps": Lazy("_verbs:ps", "List running VMs; `volar vms list` has more columns."),
        "top": Lazy(
            "_top:top",
            "Show the resource use of VMs, until interrupted.",
        ),
        "logs": Lazy("_logs:logs", "Print the log of a VM's console and workload."),
        "cp": Lazy("_copy:copy", "Copy files and directories between this host and a VM."),
        "start": Lazy("_verbs:start", "Start VMs, and wait until they run."),
        "stop": Lazy("_verbs:stop", "Stop VMs, and wait until they are stopped."),
        "restart": Lazy("_verbs:restart", "Restart VMs, and wait until they run."),
        "rm": Lazy("_verbs:rm", "Delete VMs with their disks; running VMs only with -f."),
        "inspect": Lazy("_verbs:inspect", "Print all properties of VMs, as JSON."),
        "events": Lazy("_events:group", "Print events of VMs as they happen, until interrupted."),
        "call": Lazy("_call:group", "Call an action of a VM's plugin, and print the answer."),
    },
    "Manage": {
        "vms": Lazy("_vms:group", "Create, watch and use VMs: all commands for them."),
        "volumes": Lazy("_volumes:group", "Manage volumes: disks that outlive VMs."),
        "images": Lazy("_images:group", "Manage OCI images, which VMs are made from."),
        "secrets": Lazy("_secrets:group", "Manage tokens, passwords and keys for VMs."),
        "networks": Lazy("_networks:group", "Manage networks in which VMs reach each other by name."),
        "snapshots": Lazy("_snapshots:group", "Manage snapshots of VMs."),
        "forks": Lazy("_forks:forks", "Show which VM was forked or restored from which, and the snapshots, as a tree."),
        "projects": Lazy("_projects:group", "Manage projects: namespaces with limits."),
        "plugins": Lazy("_plugins:group", "Manage plugins: kinds of VMs."),
        "templates": Lazy("_templates:group", "Manage templates, which new VMs are cloned from."),
        "boot-images": Lazy("_boot_images:group", "Manage boot images and artifacts, without a daemon."),
    },
    "Run the daemon": {
        "setup": Lazy("_setup:group", "Install volantd as a systemd service, and start it."),
        "keys": Lazy("_keys:group", "Manage API keys: their roles, projects and expiry."),
        "hosts": Lazy("_hosts:group", "Manage the hosts of a fleet."),
        "fleet": Lazy("_fleet:group", "Show the fleet of a host, join a fleet, or leave it."),
        "audit": Lazy("_audit:group", "Print the audit log: changes, refused requests and accesses to guests."),
        "system": Lazy("_system:group", "Inspect, maintain and back up the daemon."),
        "debug": Lazy("_debug:group", "Collect information for a bug report."),
        "login": Lazy("_login:login", "Sign in to a daemon at its OpenID Connect issuer."),
        "logout": Lazy("_login:logout", "Remove the stored token of `volar login`."),
        "remote": Lazy("_remote:group", "Manage the daemons that you use by name."),
        "mcp": Lazy("_mcp:group", "Print the configuration that MCP clients need."),
        "completion": Lazy(
            "_complete:group",
            "Print the completion script for a shell.",
        ),
    },
}
"""All commands, in the order of the help."""


class _Groups(LazyGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.lazy)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _SECTIONS.items():
            self.write_commands(ctx, formatter, title, commands)


@click.command(
    cls=_Groups,
    lazy={name: lazy for commands in _SECTIONS.values() for name, lazy in commands.items()},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="volar", message="%(prog)s %(version)s")
@common(tls=True)
def volar() -> None:
    """Control microVMs through a running volantd.

    \b
    Exit codes: 0 success, 1 failure, 2 wrong usage, 3 not found, 4 conflict with the current state,
    5 daemon unreachable, 124 timeout, 130 interrupted. `run` and `exec` exit with the code of their
    program, or 128 + n if signal n ended it; with 125 if volar or the daemon failed.
    """


def invoke(arguments: Sequence[str] | None) -> int:
    """Runs the command in `arguments`; returns the exit code."""
    try:
        code = volar.main(args=arguments, prog_name="volar", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    return code if isinstance(code, int) else 0
