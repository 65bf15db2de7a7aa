"""What can go wrong with etcd. A caller has to know whether its change may have happened."""

from __future__ import annotations


class EtcdError(Exception):
    """Something is wrong with etcd; the text says what, for people."""


class EtcdUnavailable(EtcdError):
    """No member has answered. The request has changed nothing."""


class OutcomeUnknown(EtcdError):
    """The request was sent and has no answer: it may have changed something, now or soon. Read again before you
    decide."""


class EtcdRefused(EtcdError):
    """etcd has refused the request, which has changed nothing: wrong credentials, no space, a request that is too
    large."""


class LeaseGone(EtcdError):
    """The lease has expired or was revoked, and its keys are deleted."""


class Compacted(EtcdError):
    """The revisions that are asked for are not kept any more, or were never there: etcd was restored from a backup.
    List again, and say that changes were missed."""

    def __init__(self) -> None:
        super().__init__("etcd does not keep the changes since the last one that is known")
