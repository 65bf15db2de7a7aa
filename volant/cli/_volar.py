"""`volar`: its groups of commands, loaded when they are used, as what they import takes longer than most commands."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import click

from volant import __version__

from ._options import common

_GROUPS = {
    "vms": ("volant.cli._vms", "Create, watch and use VMs."),
    "events": ("volant.cli._events", "Print events of VMs as they happen."),
    "images": ("volant.cli._images", "Build and list boot images, without a daemon."),
    "call": ("volant.cli._call", "Call an action of a VM's workload."),
    "plugins": ("volant.cli._plugins", "Manage plugins: kinds of VMs."),
    "networks": ("volant.cli._networks", "Manage networks in which VMs reach each other."),
    "snapshots": ("volant.cli._snapshots", "Manage snapshots of VMs."),
    "templates": ("volant.cli._templates", "Manage templates, which new VMs are cloned from."),
    "system": ("volant.cli._system", "Inspect and maintain the daemon."),
    "mcp": ("volant.cli._mcp", "Print the configuration that MCP clients need."),
    "debug": ("volant.cli._debug", "Collect information for a bug report."),
    "setup": ("volant.cli._setup", "Install the daemon as a systemd service."),
    "completion": ("volant.cli._completion", "Print completion scripts for shells."),
}


class _Groups(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_GROUPS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _GROUPS:
            return None
        group: click.Command = importlib.import_module(_GROUPS[cmd_name][0]).group
        return group

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _GROUPS.items()])


@click.command(cls=_Groups, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="volar", message="%(prog)s %(version)s")
@common(environment=True)
def volar() -> None:
    """Control microVMs through a running volantd.

    \b
    Exit codes: 0 success, 1 failure, 2 wrong usage, 3 not found, 4 conflict with the present state,
    5 daemon unreachable, 124 timeout, 130 interrupted. `vms exec` passes on the
    exit code of its command, or 128 + n when signal n ended it.
    """


def invoke(arguments: Sequence[str] | None) -> int:
    """Do what the arguments say; return the exit code."""
    try:
        code = volar.main(args=arguments, prog_name="volar", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    return code if isinstance(code, int) else 0
