"""A control plane for microVMs on one host."""
