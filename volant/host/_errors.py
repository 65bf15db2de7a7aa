"""Errors of more than one facet."""


class ProcessGone(Exception):
    """There is no process with this identity (any more)."""
