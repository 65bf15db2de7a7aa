"""The states of a workload. Apart from `agent_types`, whose types take long to make and are for checkers only."""

from __future__ import annotations

from typing import Literal

WorkloadState = Literal["none", "starting", "healthy", "unhealthy", "exited", "failed"]
