"""Trio helpers that any room may use. They know no VM and no operating system."""

from ._backoff import Backoff
from ._fair_share import FairShare, TokenBucket
from ._helpers import open_helpers
from ._places import NoPlace, Places
from ._task_dump import dump_tasks

__all__ = ["Backoff", "FairShare", "NoPlace", "Places", "TokenBucket", "dump_tasks", "open_helpers"]
