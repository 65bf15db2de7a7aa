"""The journal: durable state, and events in order."""

from ._api_keys import ApiKeys as ApiKeys, requires_keys as requires_keys
from ._audit import AuditFilter as AuditFilter, AuditFrame as AuditFrame, AuditLog as AuditLog, AuditPage as AuditPage
from ._backups import Backup as Backup, Backups as Backups
from ._client import (
    JournalRef as JournalRef,
    Recorder as Recorder,
    ask_journal as ask_journal,
    journal_down as journal_down,
)
from ._definitions import (
    KEYS_REQUIRED as KEYS_REQUIRED,
    Changes as Changes,
    Definition as Definition,
    definitions_of as definitions_of,
    encode_definition as encode_definition,
    place_of as place_of,
    read_definition as read_definition,
    uses_of as uses_of,
    without_use as without_use,
)
from ._errors import (
    BadRow as BadRow,
    DatabaseRefused as DatabaseRefused,
    DuplicateRequest as DuplicateRequest,
    JournalBroken as JournalBroken,
    StaleRow as StaleRow,
)
from ._events import (
    EventCursor as EventCursor,
    EventGap as EventGap,
    EventLog as EventLog,
    EventLogStatistics as EventLogStatistics,
    FrameCursor as FrameCursor,
)
from ._frames import EventFrame as EventFrame
from ._journal import Journal as Journal
from ._merge import Evidence as Evidence, Running as Running
from ._named import OWN_NAMES as OWN_NAMES, Names as Names, Plugin as Plugin, plugin_view as plugin_view
from ._projection import Projection as Projection
from ._quotas import used_by as used_by
from ._responses import (
    IdempotencyKey as IdempotencyKey,
    StoredResponse as StoredResponse,
    StoredResponses as StoredResponses,
)
from ._restore import (
    replaced_databases as replaced_databases,
    restore_offline as restore_offline,
    take_over as take_over,
)
from ._results import (
    NetworkCreated as NetworkCreated,
    PluginChanged as PluginChanged,
    PluginInstalled as PluginInstalled,
    ProjectCreated as ProjectCreated,
    Refusal as Refusal,
    Result as Result,
    SnapshotTaken as SnapshotTaken,
    VmChanged as VmChanged,
    VmCreated as VmCreated,
    VmForked as VmForked,
    VolumeChanged as VolumeChanged,
    VolumeCreated as VolumeCreated,
)
from ._store import Retention as Retention, Store as Store
from .messages import (
    SHARED as SHARED,
    VERSION_CHANGED as VERSION_CHANGED,
    AbandonVolume as AbandonVolume,
    AddImageEvent as AddImageEvent,
    AddKey as AddKey,
    AddNetwork as AddNetwork,
    AddProject as AddProject,
    AddSnapshot as AddSnapshot,
    AdoptRow as AdoptRow,
    ArriveRow as ArriveRow,
    BeginRemovalOfVolume as BeginRemovalOfVolume,
    BeginSnapshot as BeginSnapshot,
    BeginVolume as BeginVolume,
    CommitSteps as CommitSteps,
    CountBuild as CountBuild,
    CreateRow as CreateRow,
    Draft as Draft,
    Drafted as Drafted,
    EnablePlugin as EnablePlugin,
    EndDrain as EndDrain,
    FinishSnapshot as FinishSnapshot,
    FinishVolume as FinishVolume,
    ForgetVolume as ForgetVolume,
    ForkRow as ForkRow,
    InstallPlugin as InstallPlugin,
    NoteKeyUses as NoteKeyUses,
    NotePush as NotePush,
    ReencryptSecret as ReencryptSecret,
    RemoveKey as RemoveKey,
    RemoveNetwork as RemoveNetwork,
    RemovePlugin as RemovePlugin,
    RemoveProject as RemoveProject,
    RemoveSecret as RemoveSecret,
    RemoveSnapshot as RemoveSnapshot,
    ResizeRow as ResizeRow,
    RestoreRow as RestoreRow,
    RotateKey as RotateKey,
    SealSecret as SealSecret,
    SetDrain as SetDrain,
    SetProjectEgress as SetProjectEgress,
    SetQuota as SetQuota,
    StillThere as StillThere,
    StoreRefusal as StoreRefusal,
    TakeDefinitions as TakeDefinitions,
    WriteRecord as WriteRecord,
)
