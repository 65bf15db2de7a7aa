"""Events of VMs as AG-UI events."""

from ._events import AguiEvent as AguiEvent, RunAgentInput as RunAgentInput
from ._route import routes as routes
