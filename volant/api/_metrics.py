"""`/metrics`: what operators alert on, as Prometheus text or OpenMetrics, by the scraper's `Accept`.

Gauges are read at each scrape; counters are kept where their events happen (`journal`). Only the restarts are labelled
with a VM's name, and only while they are not 0, as names are created and deleted all the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quart import Response, request
from quart_trio import QuartTrio

from volant import __version__
from volant.model import EventType, Status
from volant.operations import ApiDeps

from ._json import no_query

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric


def add_routes(app: QuartTrio, deps: ApiDeps) -> None:
    """The routes of this resource."""
    registries: list[CollectorRegistry] = []

    @app.get("/metrics")
    async def metrics() -> Response:
        no_query()
        # Imported at the first scrape, which most daemons of developers never get.
        from prometheus_client.exposition import choose_encoder

        if not registries:
            registries.append(_registry(deps))
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return Response(encode(registries[0]), content_type=content_type)


def _registry(deps: ApiDeps) -> CollectorRegistry:
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.registry import Collector

    class Volant(Collector):
        def collect(self) -> Iterable[Metric]:
            return _collect(deps)

        def describe(self) -> Iterable[Metric]:
            return []

    registry = CollectorRegistry()
    registry.register(Volant())
    ProcessCollector(registry=registry)
    return registry


def _collect(deps: ApiDeps) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

    def gauge(name: str, text: str, value: float) -> Metric:
        return GaugeMetricFamily(name, text, value=value)

    store = deps.store
    rows = store.projection.rows()
    yield InfoMetricFamily("volant_build", "The version of the daemon", value={"version": __version__})
    yield gauge("volant_healthy", "1 when all parts of the daemon run, as in /healthz", deps.system.health() == "ok")

    yield gauge("volant_draining", "1 while the daemon is drained: no VM may start", store.projection.drain is not None)

    states = Counter(row.status for row in rows)
    vms = GaugeMetricFamily("volant_vms", "VMs by status", labels=["status"])
    for status in Status:
        vms.add_metric([status.value], states[status])
    yield vms
    memory = GaugeMetricFamily("volant_vms_memory_bytes", "Configured memory of VMs, by status", labels=["status"])
    for status in Status:
        memory.add_metric([status.value], sum(row.memory_mb for row in rows if row.status is status) * 2**20)
    yield memory
    yield gauge(
        "volant_vms_wanted_running",
        "VMs whose desired status is running",
        sum(row.desired == "running" for row in rows),
    )
    lost = sum(row.reason is not None and row.reason.code == "control_lost" for row in rows)
    yield gauge("volant_vms_control_lost", "VMs that need `volar vms recover`", lost)
    restarts = GaugeMetricFamily(
        "volant_vm_restarts", "Restarts by the restart policy since a client last started the VM", labels=["vm"]
    )
    for row in rows:
        if row.restarts:
            restarts.add_metric([row.name], row.restarts)
    yield restarts

    figures = store.figures
    events = CounterMetricFamily("volant_vm_events", "Events since the daemon started, by type", labels=["type"])
    for kind in EventType:
        events.add_metric([kind.value], figures.events[kind])
    yield events
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


def _mailboxes(tree: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the mailboxes of the tree, by the root's child below which they are."""
    found: dict[str, list[Mapping[str, Any]]] = {}

    def look(node: Mapping[str, Any], actor: str) -> None:
        if "mailbox" in node:
            found.setdefault(actor, []).append(node["mailbox"])
        for child in node.get("children", ()):
            look(child, actor)

    for child in tree.get("children", ()):
        look(child, child["name"])
    return found
