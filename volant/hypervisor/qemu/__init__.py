"""The QEMU driver."""

from ._argv import ENVIRONMENT, PROGRAM
from ._driver import QemuHypervisor
from ._enclosure import WallPlan, user_of

__all__ = ["ENVIRONMENT", "PROGRAM", "QemuHypervisor", "WallPlan", "user_of"]
