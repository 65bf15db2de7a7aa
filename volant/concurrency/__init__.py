"""Trio helpers for all packages, independent of VMs and the operating system."""

from ._fair_share import FairShare as FairShare, NoPlace as NoPlace, Places as Places, TokenBucket as TokenBucket
from ._helpers import Backoff as Backoff, open_helpers as open_helpers
from ._task_dump import dump_tasks as dump_tasks
