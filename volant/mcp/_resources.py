"""The resources that models can read, by their URIs."""

from __future__ import annotations

import re

RESOURCE = re.compile(r"volant://vms/([^/]+)(?:/(logs|files)(/.*)?)?\Z", re.DOTALL)
READ_BY = {"": "get_vm", "logs": "vm_logs", "files": "read_file"}
"""The operation that reads each kind of resource, and whose permission it needs."""
