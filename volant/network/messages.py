"""What can be asked of the actor that keeps the host's side of networks."""

from __future__ import annotations

from dataclasses import dataclass

from actors import Request

from ._backend import NetworkFailed


@dataclass(frozen=True, slots=True)
class Attach(Request[None]):
    """A VM whose row has a tag is about to be launched: answered once its tap is there, on the bridge, and the
    firewall lets it out. One that needs no tap is answered at once.

    :raises NetworkFailed: it can't be had.
    """

    vm_id: int
    raises = (NetworkFailed,)


@dataclass(frozen=True, slots=True)
class Detach(Request[None]):
    """Nothing of a VM runs any more: answered once its tap and its rules are gone.

    :raises NetworkFailed: they can't be removed.
    """

    vm_id: int
    raises = (NetworkFailed,)


@dataclass(frozen=True, slots=True)
class Confine(Request[None]):
    """A passt is about to be started: answered once it can send nothing to the host itself, where that is possible.

    :raises NetworkFailed: it is, and can't be done now.
    """

    raises = (NetworkFailed,)


@dataclass(frozen=True, slots=True)
class Reconcile(Request[None]):
    """Look at all of it, make what is missing and remove what is stale; answered once it is as the rows say.

    :raises NetworkFailed: it is not.
    """

    raises = (NetworkFailed,)
