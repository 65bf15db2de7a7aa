"""Trio helpers that any room may use. They know no VM and no operating system."""

from ._fair_share import FairShare, NoPlace, Places, TokenBucket
from ._helpers import Backoff, open_helpers
from ._task_dump import dump_tasks

__all__ = ["Backoff", "FairShare", "NoPlace", "Places", "TokenBucket", "dump_tasks", "open_helpers"]
