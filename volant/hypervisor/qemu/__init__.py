"""The QEMU driver."""

from ._argv import PROGRAM as PROGRAM
from ._driver import QemuHypervisor as QemuHypervisor
from ._sandbox import SandboxPlan as SandboxPlan, user_of as user_of
