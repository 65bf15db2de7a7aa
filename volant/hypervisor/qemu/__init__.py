"""The QEMU driver."""

from ._argv import ENVIRONMENT, PROGRAM
from ._driver import QemuHypervisor

__all__ = ["ENVIRONMENT", "PROGRAM", "QemuHypervisor"]
