"""The states of a workload. Separate from `agent_types`, whose types are slow to create and only for checkers."""

from __future__ import annotations

from typing import Literal

WorkloadState = Literal["none", "starting", "healthy", "unhealthy", "exited", "failed"]
