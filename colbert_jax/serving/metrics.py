"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one application, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._gauges: list[tuple[Gauge, Callable[[], Iterable]]] = []
        self._requests = Counter(
            "colbert_jax_requests_total",
            "Requests by route and status",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "colbert_jax_request_seconds",
            "Seconds from a request to its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._sizes = Histogram(
            "colbert_jax_batch_size",
            "Requests that were computed together",
            ["lane"],
            buckets=_SIZES,
            registry=self._registry,
        )
        self._batches = Histogram(
            "colbert_jax_batch_seconds",
            "Seconds that a batch took",
            ["lane"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, lane: str) -> Callable[[int, float], None]:
        """What counts the batches of a lane: told their size and seconds."""
        sizes, seconds = self._sizes.labels(lane), self._batches.labels(lane)

        def observe(size: int, took: float) -> None:
            sizes.observe(size)
            seconds.observe(took)

        return observe

    def gauge(self, name: str, about: str, label: str, read: Callable[[], Iterable]) -> None:
        """Add a gauge whose values, pairs of label and number, are read when it is asked for."""
        gauge = Gauge(f"colbert_jax_{name}", about, [label], registry=self._registry)
        self._gauges.append((gauge, read))

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        for gauge, read in self._gauges:
            for value, number in read():
                gauge.labels(value).set(number)
        return generate_latest(self._registry)
