"""The QEMU driver."""

from ._driver import QemuHypervisor

__all__ = ["QemuHypervisor"]
