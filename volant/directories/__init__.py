"""Directories of the host in VMs: which a VM may have, and a virtiofsd for each."""

from ._allowed import AllowedDirectory, check_allowed, parse_allowed
from ._virtiofsd import PROGRAM, DirectoryFailed, Virtiofsd, directory_socket, directory_tag, find_program

__all__ = [
    "PROGRAM",
    "AllowedDirectory",
    "DirectoryFailed",
    "Virtiofsd",
    "check_allowed",
    "directory_socket",
    "directory_tag",
    "find_program",
    "parse_allowed",
]
