"""Many hosts as one: what they share is in etcd. See docs/explanation/fleet.md."""

from ._alive import PAUSE_AFTER, SignOfLife, pause_at
from ._claims import Claim, Claims, NameTaken, ReplicaRecord, claim_of, replica_of
from ._definitions import Definitions
from ._departures import Departures
from ._errors import Compacted, EtcdError, EtcdRefused, EtcdUnavailable, LeaseGone, OutcomeUnknown
from ._etcd import Etcd, EtcdSettings, make_etcd, open_etcd
from ._events import EVENT_ID, FleetCursor, Followed, follow
from ._fence import Fence, Successor, Vms
from ._fleet import SLACK_S, Fleet, FleetSettings
from ._forwarded import CALLER, HOST, Forwarded, forwarded_in, request_headers
from ._interface import (
    Change,
    Changes,
    Compare,
    Entry,
    Following,
    KeyValues,
    Lease,
    Step,
    Transaction,
    absent,
    delete,
    equal,
    fetch,
    put,
    unchanged,
)
from ._membership import IDS_OF_ONE, OLDEST, HostRecord, Member, NameInUse, check_id, known_hosts
from ._mirror import Mirror
from ._names import Names, key_of, text_of, unavailable
from ._namespace import Namespace
from ._peers import Keep, PeerAnswer, Peers
from ._placement import Wanted, obstacle_on, place
from ._replicas import Replicas
from ._tickets import REDEEM, TicketsOfOthers, WantRedeemed
from ._vector import position_text, positions_in

__all__ = [
    "CALLER",
    "EVENT_ID",
    "HOST",
    "IDS_OF_ONE",
    "OLDEST",
    "PAUSE_AFTER",
    "REDEEM",
    "SLACK_S",
    "Change",
    "Changes",
    "Claim",
    "Claims",
    "Compacted",
    "Compare",
    "Definitions",
    "Departures",
    "Entry",
    "Etcd",
    "EtcdError",
    "EtcdRefused",
    "EtcdSettings",
    "EtcdUnavailable",
    "Fence",
    "Fleet",
    "FleetCursor",
    "FleetSettings",
    "Followed",
    "Following",
    "Forwarded",
    "HostRecord",
    "Keep",
    "KeyValues",
    "Lease",
    "LeaseGone",
    "Member",
    "Mirror",
    "NameInUse",
    "NameTaken",
    "Names",
    "Namespace",
    "OutcomeUnknown",
    "PeerAnswer",
    "Peers",
    "ReplicaRecord",
    "Replicas",
    "SignOfLife",
    "Step",
    "Successor",
    "TicketsOfOthers",
    "Transaction",
    "Vms",
    "WantRedeemed",
    "Wanted",
    "absent",
    "check_id",
    "claim_of",
    "delete",
    "equal",
    "fetch",
    "follow",
    "forwarded_in",
    "key_of",
    "known_hosts",
    "make_etcd",
    "obstacle_on",
    "open_etcd",
    "pause_at",
    "place",
    "position_text",
    "positions_in",
    "put",
    "replica_of",
    "request_headers",
    "text_of",
    "unavailable",
    "unchanged",
]
