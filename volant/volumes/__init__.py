"""Volumes: disks with names that outlive VMs. See `docs/explanation/volumes.md`."""

from ._files import VolumeFiles, needs_replay, volume_path
from ._volumes import Volumes

__all__ = ["VolumeFiles", "Volumes", "needs_replay", "volume_path"]
