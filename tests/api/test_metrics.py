"""Metrics: what operators alert on is there, by other people's parsers, and says what is so."""

from __future__ import annotations

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.api.kit import Api

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(served: Api) -> Samples:
    answer = await served.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(answer.text)
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


async def test_vms_events_and_failures_are_counted(served: Api) -> None:
    vm = await served.crashed("demo")
    samples = await scrape(served)
    assert of(samples, "volant_vms", status="crashed") == 1
    assert of(samples, "volant_vms", status="running") == 0
    assert of(samples, "volant_vm_events_total", type="VM_CREATED") == 1
    assert of(samples, "volant_vm_failures_total", reason=vm["reason"]["code"]) == 1
    assert of(samples, "volant_event_newest") == 3
    assert of(samples, "volant_journal_commit_seconds_count") >= 1
    assert of(samples, "volant_journal_failed_commits_total") == 0
    assert of(samples, "volant_healthy") == 1
    assert of(samples, "volant_adoption_seconds") == 0.5
    assert of(samples, "process_open_fds") > 0


async def test_a_tree_that_is_not_whole_is_not_healthy(served: Api) -> None:
    served.system.now = "degraded"
    assert of(await scrape(served), "volant_healthy") == 0


async def test_a_draining_daemon_is_a_metric(served: Api) -> None:
    assert of(await scrape(served), "volant_draining") == 0
    assert (await served.client.post("/api/v1/system/drain")).status_code == 200
    assert of(await scrape(served), "volant_draining") == 1
    assert of(await scrape(served), "volant_healthy") == 1


async def test_a_scraper_that_accepts_openmetrics_gets_it(served: Api) -> None:
    answer = await served.server.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in parse_openmetrics(answer.body.decode())}  # type: ignore[no-untyped-call]
    assert {"volant_vms", "volant_build", "volant_journal_commit_seconds"} <= names
