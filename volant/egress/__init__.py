"""Answers the DNS queries of VMs with an egress policy, and shows what these were denied."""

from ._activity import EgressActivity
from ._messages import dns_obstacle
from ._resolvers import VmResolvers
from ._sockets import DnsListener, DnsSockets, HostDns

__all__ = ["DnsListener", "DnsSockets", "EgressActivity", "HostDns", "VmResolvers", "dns_obstacle"]
