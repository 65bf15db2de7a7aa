"""`/metrics`: metrics for alerts, as Prometheus text or OpenMetrics, depending on the scraper's `Accept`.

Gauges are read at each scrape; counters are kept where their events happen (`journal`). Only restarts and denied
connections are labelled with a VM's name, and only while they are not 0, as names are created and deleted all the time.

A caller that sees one project gets the figures of its VMs; the other figures cover the daemon and all VMs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from quart import Response, request
from quart_trio import QuartTrio

from volant import __version__
from volant.http import seen_project
from volant.model import IMAGE_EVENTS, VM_EVENTS, Status
from volant.operations import ApiDeps

from ._json import no_query

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric


def add_routes(app: QuartTrio, deps: ApiDeps) -> None:
    """Adds the routes of this resource."""
    registries: list[CollectorRegistry] = []
    # Denied connections by VM, read before each scrape.
    denied: dict[int, int] = {}

    @app.get("/metrics")
    async def metrics() -> Response:
        no_query()
        # Imported at the first scrape, which most daemons of developers never get.
        from prometheus_client import ProcessCollector
        from prometheus_client.exposition import choose_encoder

        project = seen_project(request.scope)
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        found = await deps.egress.denied_connections()
        denied.clear()
        denied.update(found)
        if project is not None:
            return Response(encode(_registry(partial(_of_vms, deps, denied, project))), content_type=content_type)
        if not registries:
            registries.append(_registry(partial(_collect, deps, denied)))
            ProcessCollector(registry=registries[0])
        return Response(encode(registries[0]), content_type=content_type)


def _registry(collect: Callable[[], Iterable[Metric]]) -> CollectorRegistry:
    from prometheus_client import CollectorRegistry
    from prometheus_client.registry import Collector

    class Volant(Collector):
        def collect(self) -> Iterable[Metric]:
            return collect()

        def describe(self) -> Iterable[Metric]:
            return []

    registry = CollectorRegistry()
    registry.register(Volant())
    return registry


def _collect(deps: ApiDeps, denied: Mapping[int, int]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

    def gauge(name: str, text: str, value: float) -> Metric:
        return GaugeMetricFamily(name, text, value=value)

    store = deps.store
    yield InfoMetricFamily("volant_build", "The version of the daemon", value={"version": __version__})
    yield gauge("volant_healthy", "1 when all parts of the daemon run, as in /healthz", deps.system.health() == "ok")

    yield gauge("volant_draining", "1 while the daemon is drained: no VM may start", store.projection.drain is not None)

    yield from _of_vms(deps, denied, None)

    figures = store.figures
    events = CounterMetricFamily("volant_vm_events", "Events since the daemon started, by type", labels=["type"])
    for kind in VM_EVENTS:
        events.add_metric([kind.value], figures.events[kind])
    yield events
    of_images = CounterMetricFamily(
        "volant_image_events", "Events of OCI images since the daemon started, by type", labels=["type"]
    )
    for kind in IMAGE_EVENTS:
        of_images.add_metric([kind.value], figures.events[kind])
    yield of_images
    failures = CounterMetricFamily("volant_vm_failures", "VMs that crashed, by reason", labels=["reason"])
    for code, count in sorted(figures.failures.items()):
        failures.add_metric([code], count)
    yield failures

    fallbacks = CounterMetricFamily(
        "volant_template_fallbacks", "Cold boots after a clone failed, by reason", labels=["reason"]
    )
    for code, count in sorted(figures.fallbacks.items()):
        fallbacks.add_metric([code], count)
    yield fallbacks
    warm_pool = deps.vms.warm_pool
    yield gauge("volant_standby_waiting", "Paused processes in the warm pool", len(warm_pool.tags))
    yield CounterMetricFamily(
        "volant_standby_claims", "VMs that started from a process of the warm pool", value=warm_pool.figures.claimed
    )
    yield CounterMetricFamily(
        "volant_standby_misses", "Clones that began while none was waiting", value=warm_pool.figures.missed
    )
    yield CounterMetricFamily(
        "volant_standby_failed_claims",
        "Processes of the warm pool that a VM could not claim; an ordinary clone followed each time",
        value=warm_pool.figures.failed_claims,
    )

    commits = HistogramMetricFamily("volant_journal_commit_seconds", "Time of a commit, up to the disk's confirmation")
    buckets = [
        ("+Inf" if bound == float("inf") else repr(bound), count) for bound, count in figures.commits.cumulative()
    ]
    commits.add_metric([], buckets, figures.commits.sum_s)
    yield commits
    yield CounterMetricFamily(
        "volant_journal_failed_commits", "Commits that failed at the disk", value=figures.failed_commits
    )

    yield CounterMetricFamily(
        "volant_audit_records", "Records of the audit log that were written", value=figures.records
    )
    yield CounterMetricFamily(
        "volant_audit_lost",
        "Refused requests that could not be recorded in the audit log",
        value=figures.lost_records,
    )
    refused = CounterMetricFamily(
        "volant_auth_failures", "Requests refused for their credentials, by reason", labels=["reason"]
    )
    for reason, count in sorted(deps.access.failures.items()):
        refused.add_metric([reason], count)
    yield refused
    limited = CounterMetricFamily(
        "volant_limited_requests", "Requests refused as their caller sent too many, by limit", labels=["limit"]
    )
    for limit, count in sorted(deps.access.use.refused.items()):
        limited.add_metric([limit], count)
    yield limited

    log = store.events.statistics()
    yield gauge("volant_event_readers", "Open event streams", log.readers)
    yield gauge("volant_event_reader_lag", "Events that the slowest reader is behind", log.slowest_lag)
    yield gauge("volant_event_newest", "Number of the newest event", log.newest)

    adoption_s = deps.system.adoption_s
    if adoption_s is not None:
        yield gauge("volant_adoption_seconds", "Time that the daemon took at its start to adopt the VMs", adoption_s)
    depth = GaugeMetricFamily(
        "volant_mailbox_depth", "Queued messages; of VMs, those of the longest queue", labels=["actor"]
    )
    oldest = GaugeMetricFamily("volant_mailbox_oldest_seconds", "Age of the oldest queued message", labels=["actor"])
    for actor, mailboxes in _mailboxes(deps.system.tree()).items():
        depth.add_metric([actor], max(mailbox["depth"] for mailbox in mailboxes))
        oldest.add_metric([actor], max(mailbox["oldest_s"] or 0.0 for mailbox in mailboxes))
    yield depth
    yield oldest


def _of_vms(deps: ApiDeps, denied: Mapping[int, int], project: str | None) -> Iterator[Metric]:
    """Yields the figures of the VMs of a project; None for all VMs."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    rows = [row for row in deps.store.projection.rows() if project in (None, row.project)]
    states = Counter(row.status for row in rows)
    vms = GaugeMetricFamily("volant_vms", "VMs by status", labels=["status"])
    for status in Status:
        vms.add_metric([status.value], states[status])
    yield vms
    memory = GaugeMetricFamily("volant_vms_memory_bytes", "Configured memory of VMs, by status", labels=["status"])
    for status in Status:
        memory.add_metric([status.value], sum(row.memory_mb for row in rows if row.status is status) * 2**20)
    yield memory
    yield GaugeMetricFamily(
        "volant_vms_wanted_running",
        "VMs whose desired status is running",
        value=sum(row.desired == "running" for row in rows),
    )
    lost = sum(row.reason is not None and row.reason.code == "control_lost" for row in rows)
    yield GaugeMetricFamily("volant_vms_control_lost", "VMs that need `volar vms recover`", value=lost)
    restarts = GaugeMetricFamily(
        "volant_vm_restarts",
        "Restarts by the restart policy since a client last started the VM",
        labels=["project", "vm"],
    )
    for row in rows:
        if row.restarts:
            restarts.add_metric([row.project, row.name], row.restarts)
    yield restarts
    connections = CounterMetricFamily(
        "volant_vm_egress_denied_connections",
        "Connections that the egress policy of a VM denied",
        labels=["project", "vm"],
    )
    names = CounterMetricFamily(
        "volant_vm_egress_denied_names",
        "DNS queries of a VM with an egress policy that were denied or failed, since the daemon started",
        labels=["project", "vm"],
    )
    for family, counts in ((connections, denied), (names, deps.egress.denied_names())):
        for row in rows:
            if counts.get(row.id):
                family.add_metric([row.project, row.name], counts[row.id])
        yield family


def _mailboxes(tree: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the mailboxes of the tree, by the child of the root that contains them."""
    found: dict[str, list[Mapping[str, Any]]] = {}

    def look(node: Mapping[str, Any], actor: str) -> None:
        if "mailbox" in node:
            found.setdefault(actor, []).append(node["mailbox"])
        for child in node.get("children", ()):
            look(child, actor)

    for child in tree.get("children", ()):
        look(child, child["name"])
    return found
