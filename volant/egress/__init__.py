"""Answers the DNS queries of VMs with an egress policy, and reports denied connections."""

from ._activity import EgressActivity as EgressActivity
from ._messages import dns_obstacle as dns_obstacle
from ._resolvers import VmResolvers as VmResolvers
from ._sockets import DnsListener as DnsListener, DnsSockets as DnsSockets, HostDns as HostDns
