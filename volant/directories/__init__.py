"""Directories of the host in VMs: the allowed directories, and a virtiofsd for each mount."""

from ._allowed import (
    AllowedDirectory as AllowedDirectory,
    check_allowed as check_allowed,
    parse_allowed as parse_allowed,
)
from ._virtiofsd import (
    PROGRAM as PROGRAM,
    DirectoryFailed as DirectoryFailed,
    Virtiofsd as Virtiofsd,
    directory_socket as directory_socket,
    directory_tag as directory_tag,
    find_program as find_program,
)
