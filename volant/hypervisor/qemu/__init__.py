"""The QEMU driver."""

from ._argv import ENVIRONMENT, PROGRAM
from ._driver import QemuHypervisor
from ._sandbox import SandboxPlan, user_of

__all__ = ["ENVIRONMENT", "PROGRAM", "QemuHypervisor", "SandboxPlan", "user_of"]
