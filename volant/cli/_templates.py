"""`volar templates`."""

from __future__ import annotations

import click

from volant.client import TemplatesOperations
from volant.model import TemplateView

from ._complete import network_choices, plugin_names
from ._derived import Shown, add_commands
from ._lazy_group import LazyGroup
from ._shown import Sheet


@click.group(name="templates", cls=LazyGroup)
def group() -> None:
    """Manage templates, which new VMs are cloned from."""


_NETWORK = click.option(
    "--network",
    shell_complete=network_choices,
    help="none, or the network of the VMs: all VMs with a network share a template.  [default: the daemon's setting]",
)
_SHEET = Sheet(
    (
        *("digest", "state", "plugin", "after", "cpu_cores", "memory_mb", "size_bytes", "clones"),
        *("warm", "warm_hits", "warm_misses", "error"),
    )
)
add_commands(
    group,
    "templates",
    TemplatesOperations,
    Shown({TemplateView: _SHEET}, {"build": "template {digest} for {plugin} is ready"}),
    options={
        "build": {
            "plugin": click.argument("plugin", default="base", shell_complete=plugin_names),
            "network": _NETWORK,
        }
    },
)
