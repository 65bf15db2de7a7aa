"""A fleet of hosts that share state in etcd. See docs/explanation/fleet.md."""

from ._alive import PAUSE_AFTER as PAUSE_AFTER, SignOfLife as SignOfLife, pause_at as pause_at
from ._claims import (
    Claim as Claim,
    Claims as Claims,
    Departures as Departures,
    NameTaken as NameTaken,
    ReplicaRecord as ReplicaRecord,
    claim_of as claim_of,
    replica_of as replica_of,
)
from ._definitions import Definitions as Definitions
from ._etcd import Etcd as Etcd, EtcdSettings as EtcdSettings, make_etcd as make_etcd, open_etcd as open_etcd
from ._events import EVENT_ID as EVENT_ID, FleetCursor as FleetCursor, Followed as Followed, follow as follow
from ._fence import Fence as Fence, Successor as Successor, Vms as Vms
from ._fleet import SLACK_S as SLACK_S, Fleet as Fleet, FleetSettings as FleetSettings
from ._forwarded import (
    CALLER as CALLER,
    HOST as HOST,
    REDEEM as REDEEM,
    Forwarded as Forwarded,
    TicketsOfOthers as TicketsOfOthers,
    WantRedeemed as WantRedeemed,
    forwarded_in as forwarded_in,
    request_headers as request_headers,
)
from ._interface import (
    Change as Change,
    Changes as Changes,
    Compacted as Compacted,
    Compare as Compare,
    Entry as Entry,
    EtcdError as EtcdError,
    EtcdRefused as EtcdRefused,
    EtcdUnavailable as EtcdUnavailable,
    Following as Following,
    KeyValues as KeyValues,
    Lease as Lease,
    LeaseGone as LeaseGone,
    OutcomeUnknown as OutcomeUnknown,
    Step as Step,
    Transaction as Transaction,
    absent as absent,
    delete as delete,
    equal as equal,
    fetch as fetch,
    put as put,
    unchanged as unchanged,
)
from ._membership import (
    IDS_OF_ONE as IDS_OF_ONE,
    OLDEST as OLDEST,
    HostRecord as HostRecord,
    Member as Member,
    NameInUse as NameInUse,
    check_id as check_id,
    known_hosts as known_hosts,
)
from ._mirror import Mirror as Mirror
from ._names import Names as Names, key_of as key_of, text_of as text_of, unavailable as unavailable
from ._namespace import Namespace as Namespace
from ._peers import Keep as Keep, PeerAnswer as PeerAnswer, Peers as Peers
from ._placement import Wanted as Wanted, obstacle_on as obstacle_on, place as place
from ._replicas import Replicas as Replicas
from ._vector import position_text as position_text, positions_in as positions_in
