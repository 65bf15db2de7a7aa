"""A client of AG-UI, for tests of what the daemon tells it."""

from __future__ import annotations

import json
from typing import Any

from ag_ui.core import Event as AguiModel
from pydantic import TypeAdapter

_model: TypeAdapter[Any] = TypeAdapter(AguiModel)


class Telling:
    """A client's view of events: valid by AG-UI's models, and its own copy of the state."""

    def __init__(self) -> None:
        self.types: list[str] = []
        self.vms: dict[str, Any] = {}
        self.running = False
        self.steps: list[str] = []

    def take(self, event: dict[str, Any]) -> dict[str, Any]:
        _model.validate_json(json.dumps(event))
        kind = event["type"]
        self.types.append(kind)
        assert self.running != (kind == "RUN_STARTED"), self.types
        match kind:
            case "RUN_STARTED":
                self.running = True
            case "RUN_FINISHED" | "RUN_ERROR":
                self.running = False
                assert kind == "RUN_ERROR" or not self.steps
                self.steps.clear()
            case "STEP_STARTED":
                assert event["stepName"] not in self.steps
                self.steps.append(event["stepName"])
            case "STEP_FINISHED":
                self.steps.remove(event["stepName"])
            case "STATE_SNAPSHOT":
                self.vms = event["snapshot"]["vms"]
            case "STATE_DELTA":
                for operation in event["delta"]:
                    self._patch(**operation)
        return event

    def _patch(self, op: str, path: str, value: Any = None) -> None:
        _, vms, *keys = path.split("/")
        assert vms == "vms"
        target = self.vms
        for key in keys[:-1]:
            target = target[key]
        assert (keys[-1] in target) == (op in ("replace", "remove"))
        if op == "remove":
            del target[keys[-1]]
        else:
            target[keys[-1]] = value
