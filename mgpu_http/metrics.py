"""GET /metrics: what was counted here, and what the scheduler's state says at the moment."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mgpu_core.effects import StartLoad, StartUnload
from mgpu_core.scheduler import Transition
from mgpu_core.state import Phase, Residency, State
from mgpu_effects.broker import Broker
from mgpu_http.status import gpu_rows, resident_mib

WAIT_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
WORK = ("consumer", "kind")


class Metrics:
    """The numbers of one broker; each has a registry of its own."""

    def __init__(self, broker: Broker) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mgpu_requests",
            "Requests for work that ended, by HTTP status or our error code",
            (*WORK, "outcome"),
            registry=self._registry,
        )
        self._waits = Histogram(
            "mgpu_wait_seconds",
            "From the whole request to its grant",
            WORK,
            buckets=WAIT_BUCKETS_S,
            registry=self._registry,
        )
        self._loads = Counter("mgpu_loads", "Loads begun", ("consumer",), registry=self._registry)
        self._evictions = Counter(
            "mgpu_evictions", "Unloads begun", ("consumer",), registry=self._registry
        )
        self._registry.register(BrokerCollector(broker))

    def ended(self, consumer: str, kind: str, outcome: str) -> None:
        """Count a request for work; `consumer` is empty where it was refused before its routing."""
        self._requests.labels(consumer, kind, outcome).inc()

    def waited(self, consumer: str, kind: str, wait_us: int) -> None:
        self._waits.labels(consumer, kind).observe(wait_us / 1_000_000)

    def observe(self, transition: Transition) -> None:
        """Count what a step of the scheduler began."""
        for effect in transition.effects:
            if isinstance(effect, StartLoad):
                self._loads.labels(effect.consumer).inc()
            elif isinstance(effect, StartUnload):
                self._evictions.labels(effect.consumer).inc()

    def text(self) -> bytes:
        """Give the page, in Prometheus' text format."""
        return generate_latest(self._registry)


class BrokerCollector(Collector):
    """Asks the broker at each scrape: nothing is kept twice."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def collect(self) -> Iterator[Metric]:
        state = self._broker.state
        yield from _work(state)
        yield from _consumers(state)
        yield from _gpus(state)
        yield CounterMetricFamily(
            "mgpu_lost_events",
            "Events that the event log could not take",
            value=self._broker.lost_events,
        )


def _work(state: State) -> Iterator[Metric]:
    queued = GaugeMetricFamily("mgpu_queue", "Requests that wait", labels=WORK)
    served = GaugeMetricFamily("mgpu_in_flight", "Requests that are served", labels=WORK)
    counts: dict[tuple[str, str, bool], int] = {}
    for request in state.requests.values():
        key = (request.consumer, request.kind, request.phase is Phase.SERVING)
        counts[key] = counts.get(key, 0) + 1
    for (consumer, kind, serving), count in counts.items():
        (served if serving else queued).add_metric((consumer, kind), count)
    yield queued
    yield served


def _consumers(state: State) -> Iterator[Metric]:
    labels = ("consumer",)
    healthy = GaugeMetricFamily(
        "mgpu_consumer_healthy", "Whether it is believed to be reachable", labels=labels
    )
    vram = GaugeMetricFamily("mgpu_consumer_vram_mib", "Memory that it holds", labels=labels)
    served = CounterMetricFamily("mgpu_consumer_requests", "Requests granted", labels=labels)
    for name, consumer in state.consumers.items():
        loaded = consumer.residency is Residency.RESIDENT
        vram.add_metric((name,), resident_mib(state, name) if loaded else 0)
        served.add_metric((name,), consumer.total_requests)
        if consumer.healthy is not None:
            healthy.add_metric((name,), consumer.healthy)
    yield healthy
    yield vram
    yield served


def _gpus(state: State) -> Iterator[Metric]:
    for what in ("used", "free", "total"):
        gauge = GaugeMetricFamily(f"mgpu_gpu_{what}_mib", f"Memory {what}", labels=("gpu",))
        for row in gpu_rows(state):
            if row[f"{what}_mib"] is not None:
                gauge.add_metric((str(row["index"]),), row[f"{what}_mib"])
        yield gauge
