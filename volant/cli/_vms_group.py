"""The group of commands `volar vms`, for the modules that have some of them."""

from __future__ import annotations

import click

from ._complete import vm_names

name_argument = click.argument("name", shell_complete=vm_names)


@click.group(name="vms")
def group() -> None:
    """Create, watch and use VMs."""
