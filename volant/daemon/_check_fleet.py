"""`volantd check-fleet`: checks whether this host can join the fleet in its settings, without changes.

`volar fleet join` runs it before it writes the settings.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping

import msgspec
import trio

from volant.fleet import EtcdError, HostRecord, NameInUse, Namespace, check_id, known_hosts, open_etcd
from volant.model.doctor import FleetReport

from ._fleet import known_id
from ._fleet_plan import FleetPlan, fleet_of
from ._run import DaemonError
from ._settings import Settings, SettingsError, parse_address

_ETCD_S = 10.0


def check_fleet(settings: Settings) -> str:
    """Returns the report as JSON.

    :raises SettingsError: there is no fleet, a setting is invalid, or a certificate does not fit
    :raises DaemonError: etcd can't be used, or another host has the name of this host
    """
    if not settings.fleet_etcd:
        raise SettingsError("fleet_etcd is not set, so this host is in no fleet")
    plan = fleet_of(settings)
    _check_listen(settings)
    _check_certificate(settings, plan)
    try:
        hosts = trio.run(_known_hosts, plan)
        if plan.host in hosts:
            check_id(plan.host, hosts[plan.host], known_id(settings) or "")
    except EtcdError as error:
        raise DaemonError(f"etcd can't be used: {error}") from None
    except trio.TooSlowError:
        raise DaemonError(f"etcd has not answered within {_ETCD_S:g} s") from None
    except NameInUse as error:
        raise DaemonError(str(error)) from None
    report = FleetReport(host=plan.host, address=plan.address, hosts=tuple(sorted({*hosts, plan.host})))
    return msgspec.json.format(msgspec.json.encode(report)).decode()


async def _known_hosts(plan: FleetPlan) -> Mapping[str, HostRecord]:
    with trio.fail_after(_ETCD_S):
        async with open_etcd(plan.etcd) as etcd:
            return await known_hosts(Namespace(etcd, plan.prefix))


def _check_listen(settings: Settings) -> None:
    """Checks that this host has the address on which it would listen. Its port may be in use, by its own daemon."""
    name, _ = parse_address(settings.fleet_listen)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            name, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.bind(address)
    except OSError as error:
        raise SettingsError(f"fleet_listen {settings.fleet_listen}: {error.strerror or error}") from None


def _check_certificate(settings: Settings, plan: FleetPlan) -> None:
    """Connects to itself in memory, like other hosts will: the certificate must be valid for servers and for clients.

    :raises SettingsError: it is not
    """
    name, _ = parse_address(plan.address)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = plan.server.context
    context.verify_mode = ssl.CERT_REQUIRED
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = plan.client.wrap_bio(to_client, to_server, server_hostname=name)
    for why, side in 2 * (("the other hosts would refuse it", client), ("it is not good for clients", server)):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason or str(error)
            raise SettingsError(f"fleet_cert {settings.fleet_cert} does not fit {name}: {why}: {reason}") from None
