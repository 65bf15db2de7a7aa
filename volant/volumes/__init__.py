"""Volumes: named disks that outlive VMs. See `docs/explanation/volumes.md`."""

from ._files import VolumeFiles as VolumeFiles, needs_replay as needs_replay, volume_path as volume_path
from ._volumes import Volumes as Volumes
