"""`volantd check`: whether VMs can run on this host, tried with what the daemon itself uses."""

from ._examine import examine

__all__ = ["examine"]
