"""Drives `volant_client`, which openapi-python-client has generated.

Arguments: its directory and the daemon's address."""

from __future__ import annotations

import importlib
import io
import json
import sys
from typing import Any

sys.path.insert(0, sys.argv[1])


def operation(tag: str, name: str) -> Any:
    """Returns the generated module of an operation."""
    return importlib.import_module(f"volant_client.api.{tag}.{name}")


models, types = importlib.import_module("volant_client.models"), importlib.import_module("volant_client.types")
client = importlib.import_module("volant_client").Client(base_url=sys.argv[2], timeout=120)
wait = [importlib.import_module("volant_client.models.create_vm_wait_item").CreateVmWaitItem("running")]
made = operation("v_ms", "create_vm").sync(client=client, body=models.CreateVm(name="python"), wait=wait)
listed = operation("v_ms", "list_vms").sync(client=client)
got = operation("v_ms", "get_vm").sync("python", client=client)
body = types.File(payload=io.BytesIO(b"generated"))
written = operation("inside_a_vm", "write_file").sync_detailed("python", "tmp/a", client=client, body=body)
read = operation("inside_a_vm", "read_file").sync_detailed("python", "tmp/a", client=client)
exec_body = models.ExecRequest(command=["cat", "/tmp/a"])
ran = operation("inside_a_vm", "agent_exec").sync_detailed("python", client=client, body=exec_body)
gone = operation("v_ms", "delete_vm").sync_detailed("python", client=client)
print(
    json.dumps(
        {
            "made": str(made.status),
            "listed": [vm.name for vm in listed],
            "got": [got.cpu_cores, got.memory_mb],
            "written": int(written.status_code),
            "read": read.content.decode(),
            "ran": ran.content.decode(),
            "gone": int(gone.status_code),
        }
    )
)
