"""`volantd check`: checks whether VMs can run on this host, using the daemon's own code."""

from ._examine import examine as examine
