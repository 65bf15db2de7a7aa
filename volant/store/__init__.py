"""Files that are on the disk completely or not at all: caches that several daemons share, and sealed directories."""

from ._files import (
    check_space as check_space,
    disk_errors as disk_errors,
    entries as entries,
    fingerprint as fingerprint,
    read_record as read_record,
    sync_directory as sync_directory,
    write_atomically as write_atomically,
)
from ._locks import (
    held as held,
    is_named as is_named,
    lock_unless_held as lock_unless_held,
    remove_unlocked as remove_unlocked,
)
from ._sealed import (
    Damaged as Damaged,
    Seal as Seal,
    SealedDirectories as SealedDirectories,
    fresh as fresh,
    is_fresh as is_fresh,
)
from ._users import Users as Users
