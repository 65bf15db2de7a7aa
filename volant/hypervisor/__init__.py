"""From a spec to a process with a control socket, and how it ends."""

from ._interface import (
    AcceleratorChoice,
    AcceleratorName,
    Disk,
    End,
    FoundMachine,
    Hypervisor,
    HypervisorError,
    LaunchCode,
    LaunchFailed,
    Machine,
    MachineSpec,
    Template,
)

__all__ = [
    "AcceleratorChoice",
    "AcceleratorName",
    "Disk",
    "End",
    "FoundMachine",
    "Hypervisor",
    "HypervisorError",
    "LaunchCode",
    "LaunchFailed",
    "Machine",
    "MachineSpec",
    "Template",
]
