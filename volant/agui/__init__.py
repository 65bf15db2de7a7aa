"""Events of VMs as AG-UI events."""

from ._events import AguiEvent, RunAgentInput
from ._route import routes

__all__ = ["AguiEvent", "RunAgentInput", "routes"]
