"""`volar templates`."""

from __future__ import annotations

import click

from volant.client import TemplatesOperations
from volant.model import BuildTemplate

from ._complete import network_choices, plugin_names
from ._derived import add_commands
from ._lazy_group import LazyGroup
from ._options import Size, listing
from ._run import Session, command
from ._text import safe


@click.group(name="templates", cls=LazyGroup)
def group() -> None:
    """Manage templates, which new VMs are cloned from."""


@command(group, "list")
@listing
async def list_(session: Session) -> None:
    """List templates, including those that are being built or whose build failed."""
    templates = await session.client.templates.list()
    rows = (
        (
            each.digest,
            each.state,
            each.plugin,
            each.after,
            each.cpu_cores,
            each.memory_mb,
            f"{each.size_bytes / 2**20:.0f}",
            each.clones,
            each.warm,
            each.warm_hits,
            each.warm_misses,
            each.error or "",
        )
        for each in templates
    )
    columns: tuple[str, ...] = ("DIGEST", "STATE", "PLUGIN", "AFTER", "VCPUS", "MEMORY_MB", "SIZE_MB", "CLONES")
    columns += ("WARM", "HITS", "MISSES", "ERROR")
    session.out.listing(templates, columns, rows)


@command(group, "build")
@click.argument("plugin", default="base", shell_complete=plugin_names)
@click.option("--cpus", "--cpu", "cpu_cores", type=click.IntRange(1, 256), help="vCPUs; default: the plugin's.")
@click.option(
    "-m",
    "--memory",
    "memory_mb",
    type=Size(64),
    metavar="SIZE",
    help="Memory: 512M, 2G, or a number of MiB; default: the plugin's.",
)
@click.option("--cmdline", "kernel_cmdline", default="", help="The kernel command line of the VMs.")
@click.option(
    "--disk",
    "--disk-mb",
    "disk_mb",
    type=Size(),
    metavar="SIZE",
    help="Disk: 10G, or a number of MiB; default: the size of the plugin's root filesystem.",
)
@click.option(
    "--network",
    shell_complete=network_choices,
    help="none, or the network of the VMs: all VMs with a network share a template.  [default: the daemon's setting]",
)
async def build(
    session: Session,
    plugin: str,
    cpu_cores: int | None,
    memory_mb: int | None,
    kernel_cmdline: str,
    disk_mb: int | None,
    network: str | None,
) -> None:
    """Build the template for VMs of PLUGIN, and wait for it. VMs of another size need another template."""
    wanted = BuildTemplate(
        plugin=plugin,
        cpu_cores=cpu_cores,
        memory_mb=memory_mb,
        kernel_cmdline=kernel_cmdline,
        disk_mb=disk_mb,
        network=network,
    )
    template = await session.client.templates.build(wanted)
    session.out.result(template, f"template {safe(template.digest)} for {safe(template.plugin)} is ready")


add_commands(group, "templates", TemplatesOperations)
