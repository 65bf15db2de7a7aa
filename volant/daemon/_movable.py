"""The group of processes of this host's movable VMs, which can be frozen together: see `docs/explanation/fleet.md`."""

from __future__ import annotations

import logging

from volant.host import Freezer, FreezerFailed, Host, Scopes
from volant.journal import Store
from volant.vm import instance_of

from ._settings import Settings

_logger = logging.getLogger("volant.daemon")
_DIRECTORY = "movable"


def freezer_of(host: Host, settings: Settings, scopes: Scopes | None) -> Freezer:
    """Returns the group. `scopes`: those of systemd, None: it runs no daemon."""
    directory = settings.runtime_dir / _DIRECTORY
    return Freezer(host, directory, instance=instance_of(settings.state_dir), scopes=scopes)


async def end_former_fleet(host: Host, settings: Settings, scopes: Scopes | None, store: Store) -> None:
    """Removes what held movable VMs back while this host was in a fleet, unless it has not left that."""
    if not host.files.exists(settings.runtime_dir / _DIRECTORY) or any(row.movable for row in store.projection.rows()):
        return
    try:
        await freezer_of(host, settings, scopes).close()
    except FreezerFailed as error:
        _logger.warning("%s", error)
