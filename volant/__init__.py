"""A control plane for microVMs on one host."""

__version__ = "0.1.0"
