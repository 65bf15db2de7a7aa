"""The requests of the actor `network`."""

from __future__ import annotations

import msgspec

from actors import Request

from ._backend import NetworkFailed


class Attach(Request[None], msgspec.Struct, frozen=True):
    """Sets up the tap of a VM that is about to be launched; its row has a tag. Answered when the tap is on the bridge
    and the firewall lets the guest send; at once for a VM without a tap.

    :raises NetworkFailed: when the tap can't be set up.
    """

    vm_id: int
    raises = (NetworkFailed,)


class Detach(Request[None], msgspec.Struct, frozen=True):
    """Removes the tap and the rules of a VM that has no process any more. Answered when both are removed.

    :raises NetworkFailed: when they can't be removed.
    """

    vm_id: int
    raises = (NetworkFailed,)


class Confine(Request[None], msgspec.Struct, frozen=True):
    """Filters the destinations of a VM's passt, before it is started. Answered at once if the host can't filter them,
    unless the VM has an egress policy.

    :raises NetworkFailed: when the host can, but the rules can't be loaded now, or the policy can't be enforced.
    """

    vm_id: int
    raises = (NetworkFailed,)


class Release(Request[None], msgspec.Struct, frozen=True):
    """Removes the egress rules of a VM whose passt has ended.

    :raises NetworkFailed: when they can't be removed.
    """

    vm_id: int
    raises = (NetworkFailed,)


class Reconcile(Request[None], msgspec.Struct, frozen=True):
    """Makes the host match the rows: creates what is missing and removes what is stale.

    :raises NetworkFailed: when a part of it can't be done.
    """

    raises = (NetworkFailed,)
