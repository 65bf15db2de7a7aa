"""The QEMU driver."""

from ._argv import PROGRAM
from ._driver import QemuHypervisor
from ._sandbox import SandboxPlan, user_of

__all__ = ["PROGRAM", "QemuHypervisor", "SandboxPlan", "user_of"]
