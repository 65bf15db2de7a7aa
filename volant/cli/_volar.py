"""`volar`: its groups of commands, loaded when they are used, as their imports take longer than most commands."""

from __future__ import annotations

from collections.abc import Sequence

import click

from volant import __version__

from ._lazy_group import Lazy, LazyGroup
from ._options import common

_GROUPS = {
    "vms": Lazy("_vms:group", "Create, watch and use VMs."),
    "events": Lazy("_events:group", "Print events of VMs as they happen."),
    "images": Lazy("_images:group", "Build and list boot images, without a daemon."),
    "call": Lazy("_call:group", "Call an action of a VM's workload."),
    "plugins": Lazy("_plugins:group", "Manage plugins: kinds of VMs."),
    "networks": Lazy("_networks:group", "Manage networks in which VMs reach each other."),
    "snapshots": Lazy("_snapshots:group", "Manage snapshots of VMs."),
    "templates": Lazy("_templates:group", "Manage templates, which new VMs are cloned from."),
    "system": Lazy("_system:group", "Inspect and maintain the daemon."),
    "mcp": Lazy("_mcp:group", "Print the configuration that MCP clients need."),
    "debug": Lazy("_debug:group", "Collect information for a bug report."),
    "setup": Lazy("_setup:group", "Install the daemon as a systemd service."),
    "completion": Lazy("_completion:group", "Print completion scripts for shells."),
}


class _Groups(LazyGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns them in the order of the table: the most used first."""
        del ctx
        return list(self.lazy)


@click.command(
    cls=_Groups, lazy=_GROUPS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="volar", message="%(prog)s %(version)s")
@common(environment=True)
def volar() -> None:
    """Control microVMs through a running volantd.

    \b
    Exit codes: 0 success, 1 failure, 2 wrong usage, 3 not found, 4 conflict with the current state,
    5 daemon unreachable, 124 timeout, 130 interrupted. `vms exec` passes on the
    exit code of its command, or 128 + n when signal n ended it.
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
