"""What the service tells Prometheus of itself."""

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counts and times of one process; of all workers, where there are several."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "urza_requests",
            "Requests, by route, method and status.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "urza_request_seconds",
            "From the request's head to the end of its answer.",
            ("route", "method"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.running = Gauge(
            "urza_requests_running",
            "Requests that are being answered.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.refused = Counter(
            "urza_refused",
            "Requests that were turned away, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.received = Counter(
            "urza_received_bytes", "Bytes of kernels uploaded.", registry=self.registry
        )
        self.sent = Counter(
            "urza_sent_bytes", "Bytes of kernels downloaded.", registry=self.registry
        )
        self.cached = Counter(
            "urza_downloads",
            "Downloads, by whether the kernel was in memory.",
            ("memory",),
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All of it in Prometheus's format."""
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            from prometheus_client import multiprocess

            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
            return generate_latest(registry)
        return generate_latest(self.registry)
